"""Runs of faults and clean controls: which there are, and how each is run."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from tpcheck.backends.registry import load_backend
from tpcheck.batches.loader import watch
from tpcheck.checkpoints.verify import verify_checkpoint
from tpcheck.core.environment import package_versions
from tpcheck.core.errors import Mismatch, UsageError
from tpcheck.core.findings import Finding
from tpcheck.core.topology import Topology
from tpcheck.families.adapters import with_adapters
from tpcheck.families.build import small_model
from tpcheck.families.settings import unknown
from tpcheck.lab.faults.checkpoint import CheckpointFault, SavedAs
from tpcheck.lab.faults.corpus import (
    CHECKPOINT_FAULTS,
    DATA_FAULTS,
    FAULTS,
    HAND_WRITTEN_CONTROLS,
    Control,
    Fault,
    quick_controls,
    zero_stage_at,
)
from tpcheck.lab.faults.damage import Damage
from tpcheck.lab.faults.data import Build, DataFault
from tpcheck.lab.faults.fault import FaultyBackend, ModelFault, Place
from tpcheck.lab.faults.hand_written import HandWrittenControl, HandWrittenFault
from tpcheck.lab.faults.hand_written_model import batch as hand_written_batch
from tpcheck.lab.faults.hand_written_model import build as hand_written_model
from tpcheck.lab.faults.hand_written_model import layout_of
from tpcheck.lab.faults.results import CONTROL, FaultResult
from tpcheck.model.options import COMMON_DTYPES, DEFAULTS, Request, RunOptions, require_valid
from tpcheck.model.targets import resolve
from tpcheck.model.verify import run, verify_family
from tpcheck.numerics.tolerance import NUM_REPLAYS, Tolerance
from tpcheck.report.report import Report
from tpcheck.world.rank import Rank
from tpcheck.world.world import World, spawn

_TIMEOUT = 120.0  # seconds of a world
_IMPORTS = Lock()  # transformers cannot be imported by a thread while another imports peft, which takes names from it
_BATCH_TIMEOUT = 20.0  # seconds that ranks wait for each other at a batch


def versions() -> Mapping[str, str]:
    """Return the versions of the packages that faults are injected into."""
    return package_versions() | dict(load_backend(DEFAULTS.backend).versions())


@dataclass(frozen=True, slots=True)
class FaultRun:
    """One run that becomes one row of the table."""

    name: str
    kind: str
    what: str
    seed: int
    function: Callable[[], FaultResult]

    def run(self) -> FaultResult:
        """Return the result with its seed and time; an exception becomes a result, too."""
        start = time.monotonic()
        try:
            result = self.function()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            result = FaultResult(self.name, self.kind, self.what, "error", message=message)
        return replace(result, seed=self.seed, seconds=time.monotonic() - start)


def fault_runs(
    names: Sequence[str] = (), kinds: Sequence[str] = (), *, dtype: str = "float64", seeds: Iterable[int] = (0,)
) -> Iterator[FaultRun]:
    """Yield the runs of the faults with these names and kinds, or of all faults.

    Raises:
        UsageError: No such fault, kind or dtype.
    """
    faults = _selected(names, kinds)
    if dtype not in COMMON_DTYPES:
        raise UsageError("dtype", dtype, COMMON_DTYPES)
    tolerances: Tolerances = {}
    return (_fault_run(fault, dtype, seed, tolerances) for seed in seeds for fault in faults)


def control_runs(*, dtype: str = "float64", seeds: Iterable[int] = (0,)) -> Iterator[FaultRun]:
    """Yield clean runs: every family, every layout, every fixed pipeline, and every kind of saved model."""
    saved = {(fault.family, fault.saved_as, *fault.settings.items()): fault for fault in CHECKPOINT_FAULTS}
    for seed in seeds:
        yield from (
            _control(each.name, seed, partial(run_hand_written_control, each)) for each in HAND_WRITTEN_CONTROLS
        )
        yield from (model_control(control, dtype, seed) for control in quick_controls())
        for pipeline in DATA_FAULTS:
            if pipeline.fixed is not None:
                yield _control(pipeline.name, seed, partial(run_data_control, pipeline, seed=seed))
        for fault in saved.values():
            control = partial(run_saved_control, fault.family, fault.settings, saved_as=fault.saved_as, seed=seed)
            yield _control(fault.family, seed, control)


def model_control(control: Control, dtype: str, seed: int) -> FaultRun:
    """Return the run of a clean model."""
    return _control(control.family, seed, partial(run_control, control, dtype=dtype, seed=seed))


def _control(name: str, seed: int, run: Callable[[], FaultResult]) -> FaultRun:
    return FaultRun(name, CONTROL, "no fault is injected", seed, run)


def _fault_run(fault: Fault, dtype: str, seed: int, tolerances: Tolerances) -> FaultRun:
    if isinstance(fault, ModelFault):
        run = partial(run_model_fault, fault, dtype=dtype, seed=seed, tolerances=tolerances)
    elif isinstance(fault, HandWrittenFault):
        run = partial(run_hand_written_fault, fault, dtype=dtype, seed=seed)
    elif isinstance(fault, DataFault):
        run = partial(run_data_fault, fault, seed=seed)
    else:
        run = partial(run_checkpoint_fault, fault, seed=seed)
    return FaultRun(fault.name, fault.kind, fault.what, seed, run)


def _selected(names: Sequence[str], kinds: Sequence[str]) -> list[Fault]:
    known_names, known_kinds = [fault.name for fault in FAULTS], list(dict.fromkeys(fault.kind for fault in FAULTS))
    for name in names:
        if name not in known_names:
            raise UsageError("name", name, unknown("a fault that `tpcheck faults --list` shows", name, known_names))
    for kind in kinds:
        if kind not in known_kinds:
            raise UsageError("kind", kind, known_kinds)
    return [fault for fault in FAULTS if (not names or fault.name in names) and (not kinds or fault.kind in kinds)]


def _result(
    fault: Fault,
    findings: Sequence[Finding],
    *,
    true_places: Sequence[str],
    place_is_right: Callable[[Finding], bool],
    cause_is_right: Callable[[Finding], bool],
    **more: Any,
) -> FaultResult:
    """Return the result of a fault: the first finding beside the truth."""
    first = next(iter(findings), None)
    return FaultResult(
        fault=fault.name,
        kind=fault.kind,
        what=fault.what,
        checks=tuple(dict.fromkeys(finding.check for finding in findings)),
        place=None if first is None else _place(first),
        true_places=tuple(true_places),
        place_is_right=first is not None and place_is_right(first),
        cause=None if first is None else first.cause,
        true_causes=fault.causes,
        cause_is_right=first is not None and cause_is_right(first),
        link=fault.link,
        **{"margin": 0.0 if first is None else first.margin, **more},
    )


def _place(finding: Finding) -> str:
    where = finding.where
    if finding.check.startswith("batches_"):
        return str(where.get("field") or "(the whole batch)")
    return str(where.get("parameter") or where.get("module") or where.get("field") or "(the whole model)")


def model_fault_options(
    fault: ModelFault, *, dtype: str = "float64", seed: int = 0, replays: int = NUM_REPLAYS
) -> tuple[Place, Mapping[str, Any]]:
    """Return where a fault is injected at a seed, and the options of `verify_family` that inject it."""
    fault, dtype = fault.at_seed(seed), fault.dtype or dtype
    lora = fault.options.get("lora")
    with _IMPORTS:
        model = with_adapters(fault.family, fault.settings, lora) if lora else small_model(fault.family, fault.settings)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    injection = fault.injection([name for name, _ in model.named_modules()], shapes, seed)
    return injection.place, {
        "topology": fault.topology,
        "backend": FaultyBackend(injection.inject, fault.backend, fault.training_context),
        "dtype": dtype,
        "steps": fault.steps,
        "zero_stage": zero_stage_at(dtype, fault.zero_stage, fault.backend),
        "config": fault.config,
        "seed": seed,
        "settings": fault.settings,
        "ignore_plan": fault.ignore_plan,
        **fault.options,
        "replays": replays,
        "timeout": _TIMEOUT,
    }


Tolerances = dict[str, Tolerance]
"""What rounding does to the training of unsharded models, by what is trained and how."""


def run_model_fault(
    fault: ModelFault,
    *,
    dtype: str = "float64",
    seed: int = 0,
    replays: int = NUM_REPLAYS,
    tolerances: Tolerances | None = None,
) -> FaultResult:
    """Inject one fault into a small model, verify the model, and compare the first finding with the truth.

    Args:
        tolerances: What was measured for other faults, which is the same where the same is trained in the same way;
            grows by what is measured for this one.
    """
    place, options = model_fault_options(fault, dtype=dtype, seed=seed, replays=replays)
    if tolerances is None or fault.training_context is not nullcontext:  # which may change both sides
        report = verify_family(fault.family, **options)
    else:
        report = _verify_shared(fault, options, tolerances)
    dtype = options["dtype"]
    return _result(
        fault,
        report.findings,
        true_places=(*place.modules, *place.parameters),
        place_is_right=lambda first: first.check in fault.checks and place.matches(first.where),
        cause_is_right=lambda first: first.cause in fault.causes,
        verdict=report.verdict.verdict,
        dtype=dtype,
        message=report.verdict.message,
        must_show=dtype in (*fault.dtypes, fault.dtype),
        **({} if report.findings else {"margin": _worst_margin(report)}),
    )


def _verify_shared(fault: ModelFault, options: Mapping[str, Any], tolerances: Tolerances) -> Report:
    """Verify as `verify_family` does, with the tolerance that was measured before, if there is one."""
    run_options = RunOptions.of(**options)
    target = resolve(fault.family, run_options)
    key = repr((fault.family, sorted({**options, "backend": fault.backend}.items())))
    known = tolerances.get(key)
    request = Request(target.build, run_options, spread_weights=target.spread_weights, tolerance=known)
    require_valid(request)
    keep = None if known is not None else partial(tolerances.__setitem__, key)
    again = run_options.command(fault.family)
    return run(request, target.subject, again=again, notes=target.notes, on_tolerance=keep)


def control_options(control: Control, *, dtype: str = "float64", seed: int = 0) -> Mapping[str, Any]:
    """Return the options of `verify_family` for a clean run."""
    backend, dtype = control.options.get("backend", DEFAULTS.backend), control.options.get("dtype", dtype)
    zero_stage = zero_stage_at(dtype, control.zero_stage, backend)
    return {"topology": control.topology, "zero_stage": zero_stage, "seed": seed, **control.options, "dtype": dtype}


def run_control(control: Control, *, dtype: str = "float64", seed: int = 0) -> FaultResult:
    """Verify a small model without an injected fault."""
    options = control_options(control, dtype=dtype, seed=seed)
    report = verify_family(control.family, **options)
    topology, zero_stage, dtype = control.topology, options["zero_stage"], options["dtype"]
    suffix = "".join(f" {name}={value}" for name, value in control.options.items())
    return FaultResult(
        fault=f"{control.family} tp={topology.tp} dp={topology.dp} zero={zero_stage}{suffix}",
        kind=CONTROL,
        what="no fault is injected",
        verdict=report.verdict.verdict,
        margin=_worst_margin(report),
        dtype=dtype,
        message=report.verdict.message,
    )


def _worst_margin(report: Report) -> float:
    return max((check.worst_margin for check in report.verdict.checks), default=0.0)


def run_hand_written_fault(
    fault: HandWrittenFault,
    *,
    dtype: str = "float64",
    seed: int = 0,
    replays: int = NUM_REPLAYS,
    world: World | None = None,
) -> FaultResult:
    """Verify hand-written tensor parallelism with a mistake; what follows from nothing else is the mistake alone.

    Args:
        world: A world of the fault's topology, in place of a new one.
    """
    report = verify_hand_written(fault.control, dtype=dtype, seed=seed, replays=replays, world=world)
    findings = [finding for finding in report.findings if "follows_from" not in finding.evidence]
    first = [finding for finding in findings if finding.check in fault.checks]
    return _result(
        fault,
        first or findings,
        true_places=fault.places,
        place_is_right=lambda _: (
            bool(first)
            and all(Place(modules=fault.places).matches(finding.where) for finding in first)
            and all(finding.check in (*fault.checks, *_LATER) for finding in findings)
            and fault.note in str(first[0].evidence.get("note", ""))
        ),
        cause_is_right=lambda _: all(finding.cause in fault.causes for finding in first),
        verdict=report.verdict.verdict,
        dtype=dtype,
        message=report.verdict.message,
        **({} if findings else {"margin": _worst_margin(report)}),
    )


_LATER = ("gradients_match_reference", "gradient_norm_matches_reference", "updates_match_reference", "replicas_agree")


def run_hand_written_control(
    control: HandWrittenControl, *, replays: int = NUM_REPLAYS, world: World | None = None
) -> FaultResult:
    """Verify right tensor parallelism that is written by hand."""
    report = verify_hand_written(control, replays=replays, world=world)
    return FaultResult(
        fault=control.name,
        kind=CONTROL,
        what="no mistake is made",
        verdict=report.verdict.verdict,
        margin=_worst_margin(report),
        message=report.verdict.message,
    )


def verify_hand_written(
    control: HandWrittenControl,
    *,
    dtype: str = "float64",
    seed: int = 0,
    replays: int = NUM_REPLAYS,
    world: World | None = None,
) -> Report:
    """Verify the small model under tensor parallelism that is written by hand."""
    request = hand_written_request(control, dtype=dtype, seed=seed, replays=replays)
    return run(request, {"model": control.name}, again=None, world=world)


def hand_written_request(
    control: HandWrittenControl, *, dtype: str = "float64", seed: int = 0, replays: int = NUM_REPLAYS
) -> Request:
    """Return what a rank is asked to verify."""
    sharding = {"shard_model": control.shard, "layout": layout_of, "clip_gradients": control.clip}
    backend: Any = replace(load_backend("custom"), **sharding)  # type: ignore[type-var]
    options = RunOptions.of(
        topology=control.topology,
        backend=backend,
        dtype=dtype,
        zero_stage=0,
        batch=hand_written_batch,
        checks=control.checks,
        steps=1,
        seed=seed,
        replays=replays,
        timeout=_TIMEOUT,
    )
    return Request(partial(hand_written_model, **control.options), options)


def run_checkpoint_fault(fault: CheckpointFault, *, seed: int = 0) -> FaultResult:
    """Damage one tensor of a saved model, drawn by the seed, and verify the checkpoint."""
    tensors = drawn_tensors(fault.family, fault.settings, 2 * seed, saved_as=fault.saved_as)
    earlier = drawn_tensors(fault.family, fault.settings, 2 * seed + 1)
    damage = fault.drawn(tensors, earlier, seed)
    report = _verified(damage.apply(tensors), tensors, earlier, fault.saved_as)
    findings = report.findings
    return _result(
        fault,
        findings,
        true_places=tuple(damage.changed),
        place_is_right=lambda first: all(_saved_name(finding) in damage.changed for finding in findings),
        cause_is_right=lambda first: all(_is_explained(finding, fault, damage) for finding in findings),
        verdict=report.verdict.verdict,
        dtype="any",
        message=report.verdict.message,
    )


def _saved_name(finding: Finding) -> str:
    """Return the name of the tensor, as `drawn_tensors` has it."""
    return " ".join(filter(None, (finding.where.get("parameter"), finding.where.get("field"))))


def run_saved_control(
    family: str, settings: Mapping[str, Any], *, saved_as: SavedAs = "safetensors", seed: int = 0
) -> FaultResult:
    """Verify an undamaged checkpoint."""
    tensors = drawn_tensors(family, settings, 2 * seed, saved_as=saved_as)
    report = _verified(tensors, tensors, drawn_tensors(family, settings, 2 * seed + 1), saved_as)
    how = [] if saved_as == "safetensors" else [f"as {saved_as}"]
    return FaultResult(
        fault=" ".join([f"saved {family}", *how, *(f"{key}={value}" for key, value in settings.items())]),
        kind=CONTROL,
        what="the checkpoint is undamaged",
        verdict=report.verdict.verdict,
        dtype="any",
        message=report.verdict.message,
    )


def drawn_tensors(
    family: str, settings: Mapping[str, Any], seed: int, *, saved_as: SavedAs = "safetensors"
) -> dict[str, Tensor]:
    """Return random tensors with the names, shapes and ties of a small model, and moments where they are saved.

    Constants are drawn, too: equal tensors could not be told apart.
    """
    generator = torch.Generator().manual_seed(seed)
    by_storage: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in small_model(family, settings).state_dict().items():
        if tensor.data_ptr() not in by_storage:
            by_storage[tensor.data_ptr()] = torch.randn(tensor.shape, generator=generator)
        tensors[name] = by_storage[tensor.data_ptr()]
    if saved_as != "safetensors":
        drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
        tensors |= {f"{name} exp_avg": moment for name, moment in drawn.items()}
    return tensors


def _verified(
    actual: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    earlier: Mapping[str, Tensor],
    saved_as: SavedAs,
) -> Report:
    with tempfile.TemporaryDirectory(prefix="tpcheck-faults-") as folder:
        saved, before = Path(folder, "saved.safetensors"), Path(folder, "before.safetensors")
        _save(earlier, before)
        if saved_as == "safetensors":
            _save(actual, saved)
            return verify_checkpoint(saved, dict(reference), earlier=[before])
        sides = Path(folder, "actual"), Path(folder, "reference")
        for side, tensors in zip(sides, (actual, reference), strict=True):
            _save_with_moments(tensors, side, saved_as)
        return verify_checkpoint(*sides, earlier=[before])


def _save_with_moments(tensors: Mapping[str, Tensor], folder: Path, saved_as: SavedAs) -> None:
    """Write the model and the state of an optimizer that names its parameters, as the Trainer or `dcp.save` does."""
    model = {name: tensor for name, tensor in tensors.items() if " " not in name}
    state: dict[str, dict[str, Tensor]] = {name: {"step": torch.tensor(1.0)} for name in model}
    for name in tensors.keys() - model.keys():
        parameter, kind = name.split()
        state[parameter][kind] = tensors[name]
    groups = [{"lr": 1e-3, "params": [*model]}]
    if saved_as == "dcp":
        saved = {"model": model, "optimizer": {"state": state, "param_groups": groups}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no ranks
            save_distributed(saved, checkpoint_id=folder, no_dist=True)
    else:
        folder.mkdir()
        _save(model, folder / "model.safetensors")
        torch.save({"state": state, "param_groups": groups}, folder / "optimizer.pt")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, as transformers does: tied tensors once."""
    from safetensors.torch import save_file

    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.data_ptr(), name)
    save_file({name: tensors[name].contiguous() for name in names.values()}, path)


def _is_explained(finding: Finding, fault: CheckpointFault, damage: Damage) -> bool:
    """Return whether the cause is right, and the rank, dim and indices of its evidence, too."""
    story = finding.evidence.get("story") or {}
    return finding.cause in fault.causes and all(story.get(key) == value for key, value in damage.story.items())


def run_data_fault(fault: DataFault, *, seed: int = 0) -> FaultResult:
    """Iterate a faulty pipeline on every rank of a topology in which it shows, selected by the seed."""
    topology = fault.worlds[seed % len(fault.worlds)]
    findings = _watch_in_world(fault.build, topology, dropout=True)
    return _result(
        fault,
        findings,
        true_places=() if fault.leaf is None else (fault.leaf,),
        place_is_right=lambda first: first.check in fault.checks and fault.is_right_place(first.where, topology),
        cause_is_right=lambda first: (
            first.cause in fault.causes
            and all(first.evidence.get(key) == value for key, value in fault.evidence.items())
        ),
        verdict="failed" if findings else "passed",
        dtype="any",
    )


def run_data_control(fault: DataFault, *, seed: int = 0) -> FaultResult:
    """Iterate the fixed pipeline of a fault."""
    assert fault.fixed is not None
    topology = fault.fixed_worlds[seed % len(fault.fixed_worlds)]
    findings = _watch_in_world(fault.fixed, topology, dropout=fault.fixed_dropout)
    return FaultResult(
        fault=f"{fault.name}, fixed",
        kind=CONTROL,
        what="the pipeline without its fault",
        verdict="failed" if findings else "passed",
        margin=max((finding.margin for finding in findings), default=0.0),
        dtype="any",
    )


def _watch_in_world(build: Build, topology: Topology, *, dropout: bool) -> tuple[Finding, ...]:
    with spawn(topology, timeout=_TIMEOUT, env={"TPCHECK": "1"}) as world:  # a user may have set TPCHECK=0
        findings: tuple[Finding, ...] = world.run(_watch, build, dropout)[0]
        return findings


def _watch(rank: Rank, build: Build, dropout: bool) -> tuple[Finding, ...]:
    """Iterate a watched pipeline; dropout draws different numbers on every rank, as a training step may."""
    loader = watch(
        build(rank),
        topology=rank.topology,
        every=1,
        on_mismatch="raise",
        across_dp="raise",
        over_steps="raise",
        overlap=False,
        timeout=_BATCH_TIMEOUT,
    )
    try:
        for _ in loader:
            if dropout:
                torch.nn.functional.dropout(torch.ones(3 + rank.rank))
    except Mismatch as mismatch:
        return tuple(mismatch.report.findings)
    return ()
