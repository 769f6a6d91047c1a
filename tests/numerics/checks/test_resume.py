"""Comparing a resumed training with the uninterrupted one, on states made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from tpcheck.core.placement import Shard
from tpcheck.numerics.checks.resume import (
    ResumedTraining,
    SavedTraining,
    compare_other_topology,
    compare_same_topology,
)
from tpcheck.numerics.evidence import WayOutcome
from tpcheck.numerics.global_index import GlobalIndex
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.numerics.training_state import StateKey, StateTensor, TrainingState, assemble

WEIGHT, MASTER = StateKey("weight", "linear.weight"), StateKey("master", "linear.weight")
MOMENT, OTHER_MOMENT = StateKey("state", "linear.weight", "exp_avg"), StateKey("state", "head.weight", "exp_avg")
NUMBERS = {"lr of parameter group 0": 0.1, "steps taken": 1}


def draw(seed: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def state(rank: int, seed: int, numbers: Mapping[str, Any] = NUMBERS, **generators: str) -> TrainingState:
    """Return the state of one of two TP ranks that cut the first dim of (8, 6)."""
    index = GlobalIndex.shard((8, 6), Shard(0), 2, rank)
    tensors = {
        key: StateTensor(draw(100 * seed + 10 * number + rank), index)
        for number, key in enumerate((WEIGHT, MASTER, MOMENT, OTHER_MOMENT))
    }
    return TrainingState(tensors, numbers, generators, loss=float(seed))


def saved() -> list[SavedTraining]:
    return [SavedTraining(state(rank, 1), (state(rank, 2),)) for rank in range(2)]


def resumed() -> list[ResumedTraining]:
    return [ResumedTraining(state(rank, 9), state(rank, 1), (state(rank, 2),)) for rank in range(2)]


def with_tensor(of: TrainingState, key: StateKey, values: torch.Tensor) -> TrainingState:
    return replace(of, tensors={**of.tensors, key: replace(of.tensors[key], values=values)})


def loaded_with(key: StateKey, values: torch.Tensor, rank: int = 1) -> WayOutcome:
    """Compare where one rank has loaded other values than it should."""
    actual = resumed()
    actual[rank] = replace(actual[rank], loaded=with_tensor(actual[rank].loaded, key, values))
    return compare_same_topology("save_checkpoint", 1, saved(), actual)


def test_equal_trainings_pass_and_every_tensor_and_number_is_counted() -> None:
    outcome = compare_same_topology("save_checkpoint", 1, saved(), resumed())
    assert not outcome.findings
    assert set(outcome.margins.values()) == {0.0}
    assert len(outcome.margins) == 2 * 2 * (4 + 2 + 1)  # moments x ranks x (tensors, numbers, loss)


@pytest.mark.parametrize(
    ("key", "values", "cause"),
    [
        (WEIGHT, draw(900 + 1), "not_loaded"),
        (MOMENT, draw(900 + 20 + 1), "not_loaded"),
        (MASTER, draw(900 + 10 + 1), "masters_stale"),
        (MOMENT, draw(100 + 20 + 0), "optimizer_state_of_another_rank"),
        (WEIGHT, draw(100 + 0), "shard_repeated"),
        (MOMENT, draw(100 + 30 + 1), "tensor_of_another_layer"),
        (MOMENT, torch.zeros(4, 6), "all_zero"),
        (MOMENT, torch.full((4, 6), torch.nan), "not_finite"),
        (MOMENT, draw(5), None),
        (MOMENT, torch.randn(4, 3), None),
    ],
)
def test_a_tensor_that_was_loaded_wrongly_is_found_on_its_rank_and_named(
    key: StateKey, values: torch.Tensor, cause: str | None
) -> None:
    (finding,) = loaded_with(key, values).findings
    assert (finding.where["parameter"], finding.where["ranks"], finding.cause) == (key.name, [1], cause)
    assert finding.where["phase"] == "loaded"
    assert finding.where["field"] == f"{key.what}, save_checkpoint"


def test_one_wrong_element_is_found() -> None:
    values = draw(100 + 20 + 1)
    values[2, 3] += 1e-6
    (finding,) = loaded_with(MOMENT, values).findings
    assert (finding.evidence["count_differing"], finding.evidence["count_total"]) == (1, 24)


def test_masters_made_from_rounded_weights_are_named() -> None:
    low = draw(100 + 1).to(torch.bfloat16)
    expected, actual = saved(), resumed()
    expected[1] = replace(expected[1], saved=with_tensor(expected[1].saved, WEIGHT, low))
    loaded = with_tensor(with_tensor(actual[1].loaded, WEIGHT, low), MASTER, low.float())
    actual[1] = replace(actual[1], loaded=loaded)
    (finding,) = compare_same_topology("save_checkpoint", 1, expected, actual).findings
    assert (finding.cause, finding.evidence["rounded_to"]) == ("dtype_rounded", "bfloat16")


def test_moments_that_are_not_loaded_are_missing_and_named_once() -> None:
    actual = resumed()
    for rank in range(2):
        tensors = {key: tensor for key, tensor in actual[rank].loaded.tensors.items() if key.kind != "state"}
        actual[rank] = replace(actual[rank], loaded=replace(actual[rank].loaded, tensors=tensors))
    (finding,) = compare_same_topology("save_checkpoint", 1, saved(), actual).findings
    assert (finding.cause, finding.where["ranks"]) == ("tensor_missing", [0, 1])
    assert {finding.where["parameter"], *finding.evidence["also"]} == {"linear.weight", "head.weight"}


def test_a_rate_that_is_not_restored_is_found_before_the_weights_that_follow_from_it() -> None:
    actual = resumed()
    for rank in range(2):
        loaded = replace(actual[rank].loaded, numbers={**NUMBERS, "lr of parameter group 0": 0.2})
        actual[rank] = replace(actual[rank], loaded=loaded, after=(state(rank, 7),))
    (finding,) = compare_same_topology("save_checkpoint", 1, saved(), actual).findings
    assert (finding.where["field"], finding.cause) == ("lr of parameter group 0, save_checkpoint", "options_differ")
    assert (finding.evidence["resumed"], finding.evidence["uninterrupted"]) == (0.2, 0.1)


def test_what_differs_only_after_a_further_step_is_found_there() -> None:
    actual = resumed()
    actual[0] = replace(actual[0], after=(with_tensor(actual[0].after[0], WEIGHT, draw(5)),))
    (finding,) = compare_same_topology("save_checkpoint", 1, saved(), actual).findings
    assert (finding.where["phase"], finding.where["step"], finding.where["ranks"]) == ("resumed", 1, [0])


def test_a_generator_that_loading_leaves_alone_is_said_and_one_of_another_rank_is_found() -> None:
    expected = [
        SavedTraining(state(rank, 1, **{"torch generator": f"s{rank}", "python generator": "p"}), ())
        for rank in range(2)
    ]
    actual = [
        ResumedTraining(
            state(rank, 9, **{"torch generator": "f", "python generator": "f"}),
            state(rank, 1, **{"torch generator": "s0", "python generator": "f"}),
            (),
        )
        for rank in range(2)
    ]
    outcome = compare_same_topology("resume", 1, expected, actual)
    assert list(outcome.not_compared) == ["resume: python generator"]
    (finding,) = outcome.findings
    assert (finding.where["field"], finding.where["ranks"], finding.evidence["equals_rank"]) == (
        "torch generator, resume",
        [1],
        0,
    )


def test_a_loop_that_ends_early_does_not_pass() -> None:
    actual = [replace(of_rank, after=()) for of_rank in resumed()]
    (finding,) = compare_same_topology("resume", 1, saved(), actual).findings
    assert finding.where["field"] == "steps after loading, resume"
    assert (finding.evidence["resumed"], finding.evidence["uninterrupted"]) == ([0], 1)


BATCHES = (("a", "b"), ("c", "d"), ("e", "f"))


@pytest.mark.parametrize(
    ("next_batches", "cause", "resumed_with"),
    [
        (("a", "b"), "samples_repeated", "that of step 0"),
        (("c", "b"), "samples_repeated", "that of step 0, micro-batch 1"),
        (("e", "f"), "samples_skipped", "that of step 2"),
        (("d", "c"), "samples_skipped", "that of step 1, micro-batch 1"),
        (("c", "x"), None, "a batch of no step"),
        (("c",), None, "none"),
    ],
)
def test_a_loop_that_goes_on_with_other_batches_is_told_which(
    next_batches: tuple[str, ...], cause: str | None, resumed_with: str
) -> None:
    """The training stopped after the first step; weights that follow from the batches come after them."""
    expected = [replace(of_rank, batches=BATCHES) for of_rank in saved()]
    actual = resumed()
    after = with_tensor(replace(actual[0].after[0], batches=next_batches), WEIGHT, draw(5))
    actual[0] = replace(actual[0], after=(after,))
    first, weights = compare_same_topology("resume", 1, expected, actual).findings
    assert (first.where["field"], first.where["ranks"], first.cause) == ("batch, resume", [0], cause)
    assert first.evidence["resumed"] == resumed_with
    assert weights.evidence["follows_from"]
    same = [replace(of_rank, after=(replace(of_rank.after[0], batches=("c", "d")),)) for of_rank in resumed()]
    assert not compare_same_topology("resume", 1, expected, same).findings


@pytest.mark.parametrize(("batches", "fields"), [(("c", "d"), ["torch", "weight"]), (("a", "b"), ["batch", "weight"])])
def test_wrong_generators_do_not_hide_what_the_next_step_does(batches: tuple[str, ...], fields: list[str]) -> None:
    """They lead to weights that nothing else explains."""
    expected = [SavedTraining(state(0, 1, **{"torch generator": "s"}), (state(0, 2),), BATCHES)]
    after = with_tensor(replace(state(0, 2), batches=batches), WEIGHT, draw(5))
    loaded = state(0, 1, **{"torch generator": "x"})
    actual = [ResumedTraining(state(0, 9, **{"torch generator": "f"}), loaded, (after,))]
    findings = compare_same_topology("resume", 1, expected, actual).findings
    assert [finding.where["field"].split(",")[0].split(" ")[0] for finding in findings][:2] == fields
    assert findings[1].evidence["follows_from"]


def whole(of: list[TrainingState]) -> TrainingState:
    """Return the state of one rank that holds everything."""
    tensors = {key: StateTensor(values, GlobalIndex.whole((8, 6))) for key, values in assemble(of).items()}
    return TrainingState(tensors, of[0].numbers, {}, loss=None)


def at_one_rank(error: float, *, loaded: float = 0.0) -> WayOutcome:
    """Compare two ranks with one, whose weights are off by `error` after a step."""
    first = whole([state(rank, 1) for rank in range(2)])
    second = whole([state(rank, 2) for rank in range(2)])
    first = with_tensor(first, WEIGHT, first.tensors[WEIGHT].values + loaded)
    second = with_tensor(second, WEIGHT, second.tensors[WEIGHT].values + error)
    tolerance = Tolerance(1e-7, 8, {(1, "weight", "linear.weight"): 1e-3})
    return compare_other_topology("way", 1, saved(), [ResumedTraining(first, first, (second,))], tolerance)


def test_another_topology_is_exact_when_loaded_and_calibrated_afterwards() -> None:
    assert not at_one_rank(1e-4).findings
    (later,) = at_one_rank(1e-2).findings
    assert (later.where["phase"], later.where["parameter"]) == ("resumed", "linear.weight")
    assert later.margin > 1
    (at_load,) = at_one_rank(0.0, loaded=1e-6).findings
    assert (at_load.where["phase"], at_load.allowed) == ("loaded", 0.0)


def test_tensors_with_elements_on_no_rank_are_not_assembled() -> None:
    assert set(assemble([state(0, 1), state(1, 1)])) == {WEIGHT, MASTER, MOMENT, OTHER_MOMENT}
    assert not assemble([state(0, 1)])


@pytest.mark.parametrize(("steps", "cause"), [(0, "samples_repeated"), (5, "samples_skipped")])
def test_a_count_of_steps_that_is_not_restored_names_the_batches_that_follow(steps: int, cause: str) -> None:
    actual = [
        replace(rank, loaded=replace(rank.loaded, numbers={**NUMBERS, "steps taken": steps})) for rank in resumed()
    ]
    (finding,) = compare_same_topology("save_checkpoint", 1, saved(), actual).findings
    assert (finding.cause, finding.where["ranks"]) == (cause, [0, 1])
