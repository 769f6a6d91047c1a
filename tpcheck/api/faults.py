"""Plants faults one by one, and tells for each who caught it, where, and which cause was named."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tpcheck.records import Finding
from tpcheck.records.caught import CONTROL, Caught
from tpcheck.tolerance import NUM_REPLAYS
from tpcheck.topology import Topology

if TYPE_CHECKING:
    from tpcheck.faults import ModelFault
    from tpcheck.report import Report


def run_model_fault(
    fault: ModelFault, *, dtype: str = "float64", seed: int = 0, replays: int = NUM_REPLAYS, timeout: float = 120.0
) -> Caught:
    """Plant one fault in a small model, verify it, and compare what is found with what is true."""
    from tpcheck.api.model import verify_family
    from tpcheck.families.build import small_model
    from tpcheck.faults import PlantedBackend
    from tpcheck.faults.controls import zero_stage_at

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
    from tpcheck.api.model import verify_family
    from tpcheck.faults.controls import zero_stage_at

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
