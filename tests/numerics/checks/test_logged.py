"""What a library's loop logs is compared, too: behind what it follows from, and not where nothing is logged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.numerics.evidence import right_evidence
from tpcheck.core.causes import Cause
from tpcheck.numerics.checks.outputs import outputs_match_reference
from tpcheck.numerics.checks.updates import gradient_norm_matches_reference, updates_match_reference
from tpcheck.numerics.evidence import CheckOutcome, Evidence
from tpcheck.numerics.hypotheses import explain

RIGHT = right_evidence(dp=2)
LOSS = RIGHT.reference[0].loss
MEAN = LOSS + 1.0  # of the replicas' losses
LOGGED = {"loss": MEAN, "grad_norm": RIGHT.reference[0].gradient_norm or 0.0, "learning_rate": 0.5, "eval_loss": 2.0}


def logging(actual: dict[str, Any]) -> Evidence:
    """Return right evidence in which the ranks log `actual` in place of `LOGGED`."""
    ranks = tuple(replace(rank, logged=actual) for rank in RIGHT.candidate[0])
    return replace(RIGHT, reference=(replace(RIGHT.reference[0], logged=LOGGED),), candidate=(ranks,))


CHECKS = {
    "loss": (outputs_match_reference, "logged loss"),
    "grad_norm": (gradient_norm_matches_reference, "logged norm"),
    "learning_rate": (updates_match_reference, "logged learning rate"),
    "eval_loss": (updates_match_reference, "loss of the evaluation"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_logged_wrongly_is_a_finding_of_its_own(name: str) -> None:
    check, what = CHECKS[name]
    right: CheckOutcome = check(logging(LOGGED), 0)
    assert right.margins[what] == 0
    assert not right.suspects
    (suspect,) = check(logging({**LOGGED, name: LOGGED[name] * 1.001}), 0).suspects
    assert (suspect.kind, suspect.where["field"], suspect.where["ranks"]) == ("logged", what, [0, 1])
    missing = check(logging({key: value for key, value in LOGGED.items() if key != name}), 0)
    assert missing.not_compared == {what: "the Trainer does not log it"}


def test_nothing_is_compared_where_no_library_logs() -> None:
    assert not {"logged loss", "logged norm"} & set(outputs_match_reference(RIGHT, 0).margins)


def test_the_loss_of_one_replica_is_a_missing_mean() -> None:
    (suspect,) = outputs_match_reference(logging({**LOGGED, "loss": LOSS}), 0).suspects
    found = explain(suspect)
    assert found is not None
    assert found.cause is Cause.MISSING_REDUCE
    (suspect,) = outputs_match_reference(logging({**LOGGED, "loss": LOSS * 1.5}), 0).suspects
    assert explain(suspect) is None
