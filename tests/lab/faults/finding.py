"""Plants a fault and says what is wrong with what was found of it."""

from __future__ import annotations

from tpcheck.lab.faults.fault import ModelFault
from tpcheck.lab.faults.runs import run_model_fault

LEAST_MARGIN = 1e3  # of a real bug, in float64
REPLAYS = 2  # a bug stands far above them all


def require_found(fault: ModelFault, seed: int = 0) -> None:
    """Assert that a fault is caught at float64, beyond doubt, at its place, and that its cause is named."""
    found = run_model_fault(fault, seed=seed, replays=REPLAYS)
    assert found.verdict == "failed", found.message
    assert found.margin > LEAST_MARGIN
    assert found.place_is_right, (found.place, found.true_places, found.checks)
    assert found.cause_is_right, (found.cause, found.true_causes)
