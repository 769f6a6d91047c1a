"""Faults of a model, injected on real ranks: caught in float64, at their place, with a right cause.

The first fault of each kind; among the slow tests that of each cause, and every third one of the others. `ci/faults`
injects all.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpcheck.lab.faults.corpus import MODEL_FAULTS
from tpcheck.lab.faults.fault import Draw, Injection, Live, ModelFault
from tpcheck.lab.faults.runs import run_model_fault
from tpcheck.numerics.checks import RESUME_CHECK
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses import applicable

LEAST_MARGIN = 1e3  # of a fault in float64
REPLAYS = 2  # faults stand far above the noise of any number of replays
FIRST_OF_CAUSE = {
    fault.causes[0]: fault.name
    for fault in reversed(MODEL_FAULTS)
    if fault.causes[0] is not None and RESUME_CHECK not in fault.checks  # which is explained on states of all ranks
}
FIRST_OF_KIND = {fault.kind: fault.name for fault in reversed(MODEL_FAULTS)}
FAULTS = [
    fault if fault.name in FIRST_OF_KIND.values() else pytest.param(fault, marks=pytest.mark.slow)
    for number, fault in enumerate(MODEL_FAULTS)
    if number % 3 == 0 or FIRST_OF_CAUSE.get(fault.causes[0]) == fault.name
]
# Causes that a second test names, too, when the first is removed.
OF_TERMS = "the ranks' outputs show it, and so do the terms of each rank's inputs and weights"
NAMED_BY_TWO_TESTS = {
    "tensor_of_another_layer": "the whole weight shows it, and so does each rank's part",
    "missing_reduce": OF_TERMS,
    "duplicate_reduce": OF_TERMS,
    "mean_instead_of_sum": OF_TERMS,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_at_its_place_with_a_right_cause(fault: ModelFault, tmp_path: Path) -> None:
    """For the first fault of each cause also: without its test the same numbers get another cause or none."""
    is_first = FIRST_OF_CAUSE.get(fault.causes[0]) == fault.name
    result = run_model_fault(
        replace(fault, draw=recording(fault.draw, tmp_path)) if is_first else fault, replays=REPLAYS
    )
    assert result.caught, result.message
    assert result.place_is_right, (result.place, result.true_places, result.checks)
    assert result.cause_is_right, (result.cause, result.true_causes)
    assert result.margin > (LEAST_MARGIN if fault.dtype is None else 1.0)
    if is_first:
        suspects = [pickle.loads(path.read_bytes()) for path in sorted(tmp_path.glob("*.pickle"))]
        is_needed = any(needs_its_test(suspect, str(result.cause)) for suspect in suspects)
        assert is_needed != (result.cause in NAMED_BY_TWO_TESTS)


def needs_its_test(suspect: Suspect, cause: str) -> bool:
    """Return whether a suspect has the cause, and another one or none without the test that named it."""
    causes = [explanation.cause.slug for test in applicable(suspect) if (explanation := test(suspect))]
    first, second, *_ = *causes, None, None
    return first == cause != second


def recording(draw: Callable[[Draw], Injection], folder: Path) -> Callable[[Draw], Injection]:
    """Inject the same fault, and write every suspect that is explained on a rank into the folder."""

    def recorded_draw(place: Draw) -> Injection:
        injection = draw(place)

        def inject(live: Live) -> None:
            from tpcheck.numerics import group_answer

            explain = group_answer.explain

            def recorded(suspect: Suspect) -> Any:
                number = len(list(folder.iterdir()))
                (folder / f"{live.rank.rank}-{number:04d}.pickle").write_bytes(pickle.dumps(suspect))
                return explain(suspect)

            group_answer.explain = recorded
            injection.inject(live)

        return Injection(inject, injection.place)

    return recorded_draw
