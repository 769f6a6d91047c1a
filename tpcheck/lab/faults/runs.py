"""Injects faults one by one, into models, checkpoints, data pipelines, and compares what is found with what is true."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcheck.core.errors import Mismatch
from tpcheck.core.findings import Finding
from tpcheck.core.topology import Topology
from tpcheck.lab.faults.results import CONTROL, Caught
from tpcheck.numerics.tolerance import NUM_REPLAYS
from tpcheck.world.rank import Rank
from tpcheck.world.world import spawn

if TYPE_CHECKING:
    from torch import Tensor

    from tpcheck.lab.faults.checkpoint import CheckpointFault
    from tpcheck.lab.faults.damage import Damage
    from tpcheck.lab.faults.data import Build, DataFault
    from tpcheck.lab.faults.fault import ModelFault
    from tpcheck.report.report import Report


def run_model_fault(
    fault: ModelFault, *, dtype: str = "float64", seed: int = 0, replays: int = NUM_REPLAYS, timeout: float = 120.0
) -> Caught:
    """Plant one fault in a small model, verify it, and compare what is found with what is true."""
    from tpcheck.families.build import small_model
    from tpcheck.lab.faults.corpus import zero_stage_at
    from tpcheck.lab.faults.fault import PlantedBackend
    from tpcheck.model.verify import verify_family

    fault = fault.seeded(seed)
    model = small_model(fault.family, fault.settings)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    planting = fault.drawn([name for name, _ in model.named_modules()], shapes, seed)
    start = time.monotonic()
    report = verify_family(
        fault.family,
        topology=fault.topology,
        backend=PlantedBackend(planting.plant, around=fault.around),
        dtype=dtype,
        steps=fault.steps,
        zero_stage=zero_stage_at(dtype, fault.zero_stage),
        config=fault.config,
        seed=seed,
        settings=fault.settings,
        ignore_plan=fault.ignore_plan,
        replays=replays,
        timeout=timeout,
    )
    first = report.findings[0] if report.findings else None
    return Caught(
        fault=fault.name,
        kind=fault.kind,
        what=fault.what,
        verdict=report.verdict.verdict,
        checks=tuple(dict.fromkeys(finding.check for finding in report.findings)),
        place=None if first is None else _place(first),
        true_places=(*planting.place.modules, *planting.place.parameters),
        place_is_right=first is not None and first.check in fault.checks and planting.place.is_right(first.where),
        cause=None if first is None else first.cause,
        true_causes=fault.causes,
        cause_is_right=first is not None and first.cause in fault.causes,
        margin=_worst_margin(report) if first is None else first.margin,
        dtype=dtype,
        seed=seed,
        seconds=time.monotonic() - start,
        link=fault.link,
        message=report.verdict.message,
        must_show=dtype in fault.dtypes,
    )


def run_control(
    family: str, topology: Topology, *, zero_stage: int = 0, dtype: str = "float64", seed: int = 0
) -> Caught:
    """Verify a small model in which nothing is planted."""
    from tpcheck.lab.faults.corpus import zero_stage_at
    from tpcheck.model.verify import verify_family

    start = time.monotonic()
    zero_stage = zero_stage_at(dtype, zero_stage)
    report = verify_family(family, topology=topology, dtype=dtype, zero_stage=zero_stage, seed=seed)
    name = f"{family} tp={topology.tp} dp={topology.dp} zero={zero_stage}"
    return Caught(
        fault=name,
        kind=CONTROL,
        what="nothing is planted",
        verdict=report.verdict.verdict,
        margin=_worst_margin(report),
        dtype=dtype,
        seed=seed,
        seconds=time.monotonic() - start,
        message=report.verdict.message,
    )


def _worst_margin(report: Report) -> float:
    return max((check.worst_margin for check in report.verdict.checks), default=0.0)


def _place(finding: Finding) -> str:
    where = finding.where
    return str(where.get("parameter") or where.get("module") or where.get("field") or "(the whole model)")


def run_checkpoint_fault(fault: CheckpointFault, *, seed: int = 0) -> Caught:
    """Damage one tensor of a saved model, drawn by the seed, and verify the checkpoint."""
    start = time.monotonic()
    tensors = drawn_tensors(fault.family, fault.settings, 2 * seed)
    earlier = drawn_tensors(fault.family, fault.settings, 2 * seed + 1)
    damage = fault.drawn(tensors, earlier, seed)
    report = _verified(damage.of(tensors), tensors, earlier)
    found = report.findings
    first = found[0] if found else None
    return Caught(
        fault=fault.name,
        kind=fault.kind,
        what=fault.what,
        verdict=report.verdict.verdict,
        checks=tuple(dict.fromkeys(finding.check for finding in found)),
        place=None if first is None else str(first.where.get("parameter")),
        true_places=tuple(damage.changed),
        place_is_right=bool(found) and all(finding.where.get("parameter") in damage.changed for finding in found),
        cause=None if first is None else first.cause,
        true_causes=fault.causes,
        cause_is_right=bool(found) and all(_is_told(finding, fault, damage) for finding in found),
        margin=0.0 if first is None else first.margin,
        dtype="any",
        seed=seed,
        seconds=time.monotonic() - start,
        link=fault.link,
        message=report.verdict.message,
    )


def run_saved_control(family: str, settings: Mapping[str, Any], *, seed: int = 0) -> Caught:
    """Verify a checkpoint that nothing has happened to."""
    start = time.monotonic()
    tensors = drawn_tensors(family, settings, 2 * seed)
    report = _verified(tensors, tensors, drawn_tensors(family, settings, 2 * seed + 1))
    return Caught(
        fault=" ".join([f"saved {family}", *(f"{key}={value}" for key, value in settings.items())]),
        kind=CONTROL,
        what="nothing has happened to the checkpoint",
        verdict=report.verdict.verdict,
        dtype="any",
        seed=seed,
        seconds=time.monotonic() - start,
        message=report.verdict.message,
    )


def drawn_tensors(family: str, settings: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Return tensors of the names, shapes and ties of a small model; constants, which look alike, are drawn, too."""
    import torch

    from tpcheck.families.build import small_model

    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in small_model(family, settings).state_dict().items():
        if tensor.data_ptr() not in drawn:
            drawn[tensor.data_ptr()] = torch.randn(tensor.shape, generator=generator)
        tensors[name] = drawn[tensor.data_ptr()]
    return tensors


def _verified(actual: Mapping[str, Tensor], reference: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> Report:
    from tpcheck.checkpoints.verify import verify_checkpoint

    with tempfile.TemporaryDirectory(prefix="tpcheck-faults-") as folder:
        saved, before = Path(folder, "saved.safetensors"), Path(folder, "before.safetensors")
        _save(actual, saved)
        _save(earlier, before)
        return verify_checkpoint(saved, dict(reference), earlier=[before])


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, as transformers does: tied tensors once."""
    from safetensors.torch import save_file

    once: dict[int, str] = {}
    for name, tensor in tensors.items():
        once.setdefault(tensor.data_ptr(), name)
    save_file({name: tensors[name].contiguous() for name in once.values()}, path)


def _is_told(finding: Finding, fault: CheckpointFault, damage: Damage) -> bool:
    """Return whether the cause is right, and so are the rank, dim and indices that come with it."""
    story = finding.evidence.get("story") or {}
    told = all(story.get(key) == value for key, value in damage.story.items())
    return finding.cause in fault.causes and told


_PATIENCE = 20.0  # seconds that ranks wait for each other at a batch


def run_data_fault(fault: DataFault, *, seed: int = 0, timeout: float = 120.0) -> Caught:
    """Iterate a faulty pipeline on every rank of one of the topologies in which it shows, drawn by the seed."""
    start = time.monotonic()
    topology = fault.worlds[seed % len(fault.worlds)]
    findings = _found(fault.build, topology, dropout=True, timeout=timeout)
    first = findings[0] if findings else None
    return Caught(
        fault=fault.name,
        kind=fault.kind,
        what=fault.what,
        verdict="passed" if first is None else "failed",
        checks=tuple(dict.fromkeys(finding.check for finding in findings)),
        place=None if first is None else _data_place(first),
        true_places=tuple(leaf for leaf in [fault.leaf] if leaf is not None),
        place_is_right=first is not None
        and first.check in fault.checks
        and fault.is_right_place(first.where, topology),
        cause=None if first is None else first.cause,
        true_causes=fault.causes,
        cause_is_right=first is not None
        and first.cause in fault.causes
        and all(first.evidence.get(key) == value for key, value in fault.evidence.items()),
        margin=0.0 if first is None else first.margin,
        dtype="any",
        seed=seed,
        seconds=time.monotonic() - start,
        link=fault.link,
    )


def run_data_control(fault: DataFault, *, seed: int = 0, timeout: float = 120.0) -> Caught:
    """Iterate the mended pipeline of a fault."""
    assert fault.mended is not None
    start = time.monotonic()
    topology = fault.mended_worlds[seed % len(fault.mended_worlds)]
    findings = _found(fault.mended, topology, dropout=fault.mended_dropout, timeout=timeout)
    return Caught(
        fault=f"{fault.name}, mended",
        kind=CONTROL,
        what="the pipeline as it should be",
        verdict="failed" if findings else "passed",
        margin=max((finding.margin for finding in findings), default=0.0),
        dtype="any",
        seed=seed,
        seconds=time.monotonic() - start,
    )


def _found(build: Build, topology: Topology, *, dropout: bool, timeout: float) -> tuple[Finding, ...]:
    with spawn(topology, timeout=timeout, env={"TPCHECK": "1"}) as world:  # whatever the user's project says
        findings: tuple[Finding, ...] = world.run(_findings_of, build, dropout)[0]
        return findings


def _findings_of(rank: Rank, build: Build, dropout: bool) -> tuple[Finding, ...]:
    """Iterate a pipeline as a training loop does; its dropout draws other numbers on every rank, as it may."""
    import torch

    from tpcheck.batches.loader import watch

    loader = watch(
        build(rank),
        topology=rank.topology,
        every=1,
        on_mismatch="raise",
        across_dp="raise",
        overlap=False,
        timeout=_PATIENCE,
    )
    try:
        for _ in loader:
            if dropout:
                torch.nn.functional.dropout(torch.ones(3 + rank.rank))
    except Mismatch as mismatch:
        return tuple(mismatch.report.findings)
    return ()


def _data_place(finding: Finding) -> str:
    return str(finding.where.get("field") or "(the whole batch)")
