"""Traces are compared where they had the same inputs, with the weights and allowances of each optimizer step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.runs.recordings import UPDATED, WEIGHT, recorded, step
from tpcheck import UsageError
from tpcheck.runs.comparing import _key_of_replica, _layouts, _same_inputs, _with_weights, compare_recordings
from tpcheck.runs.trace import RankRecording


def compared(candidate: list[RankRecording], reference: RankRecording) -> Any:
    return compare_recordings(candidate, [reference], subject={}, again=None)


def test_equal_recordings_pass() -> None:
    verdict = compared([recorded()], recorded())
    assert (verdict.verdict, verdict.findings) == ("passed", ())


def test_a_different_update_is_found() -> None:
    changed = recorded(steps=(step({}), step({"weight": UPDATED * 100})))
    first = compared([changed], recorded()).findings[0]
    assert (first.check, first.where["step"]) == ("updates_match_reference", 1)


def test_a_replica_with_different_inputs_is_missed_coverage() -> None:
    other = recorded(rank=1, dp=2, inputs=({"0": torch.full((2,), 7.0)}, {"0": torch.zeros(2)}))
    verdict = compared([recorded(dp=2), other], recorded())
    assert verdict.coverage.not_compared["replica 1"] == "its inputs differ from the reference's"


def test_a_shorter_recording_is_compared_as_far_as_it_goes() -> None:
    verdict = compared([recorded(steps=recorded().steps[:1])], recorded())
    assert verdict.coverage.not_compared["step 1"] == "the trace of the candidate has no step 1"


def test_the_reference_is_unsharded_and_in_the_same_dtype() -> None:
    with pytest.raises(UsageError, match="a trace of the unsharded model"):
        compared([recorded()], recorded(deviations=None))
    with pytest.raises(UsageError, match="a trace in the reference's dtype, float64"):
        compared([recorded(dtype="float32")], recorded())


def test_inputs_are_equal_if_the_names_that_both_have_are() -> None:
    assert _same_inputs(recorded(inputs=({"0": torch.ones(2), "use_cache": torch.ones(1)},)), recorded())
    assert not _same_inputs(recorded(inputs=({"x": torch.ones(2)},)), recorded())  # no shared name
    assert not _same_inputs(recorded(inputs=({"0": torch.zeros(2)},)), recorded())


def test_weights_and_allowances_of_a_step_without_an_update_are_those_before() -> None:
    filled = _with_weights(recorded(deviations={(1, "weight", "weight"): 0.5}), [True, True])
    first, second = (step.weights["weight"] for step in filled.steps)
    assert torch.equal(first, WEIGHT)
    assert torch.equal(second, UPDATED)
    assert filled.deviations == {(0, "weight", "weight"): 0.0, (1, "weight", "weight"): 0.5}
    assert not _with_weights(recorded(), [False, True]).steps[0].weights


def test_a_deviation_of_an_activation_serves_every_replica() -> None:
    assert _key_of_replica((1, 0, "loss"), 3) == (1, 3, "loss")
    assert _key_of_replica((1, "weight", "w"), 3) == (1, "weight", "w")


def test_layouts_that_layers_do_not_know_are_taken_from_shapes() -> None:
    halves = [recorded(rank=rank, tp=2, layouts={}, initial={"weight": WEIGHT[:, rank : rank + 1]}) for rank in (0, 1)]
    layout = _layouts(halves, recorded())["weight"]
    assert torch.equal(layout.assemble([half.initial["weight"] for half in halves]), WEIGHT)
    uneven = [recorded(tp=2, layouts={}, initial={"weight": WEIGHT[:3, :1]})] * 2
    assert _layouts(uneven, recorded()) == {}
