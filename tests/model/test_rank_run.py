"""Calls that ranks make in different orders are compared with their counterparts."""

from __future__ import annotations

from typing import Any

import torch

from tpcheck import Rank, Topology, spawn
from tpcheck.model.rank_run import _gather_to_first, align_calls, call_digests
from tpcheck.numerics.evidence import Step, TensorKey

FULL, SLIDING = torch.tensor([1.0]), torch.tensor([2.0])


def step_of(*outputs: torch.Tensor) -> Step:
    keys = [TensorKey("forward", "rotary", call, "output", "0") for call in range(len(outputs))]
    activations = {**dict(zip(keys, outputs, strict=True)), TensorKey("forward", "once", 0, "output", "0"): FULL}
    return Step(activations, {}, {}, None, 0.0)


def test_calls_are_numbered_as_on_the_first_rank() -> None:
    first, second = step_of(FULL, SLIDING, FULL), step_of(SLIDING, FULL, FULL)
    aligned = align_calls(second, call_digests(second), call_digests(first))
    assert {key: float(tensor) for key, tensor in aligned.activations.items()} == {
        key: float(tensor) for key, tensor in first.activations.items()
    }


def test_calls_in_the_same_order_keep_their_numbers() -> None:
    first = step_of(FULL, SLIDING)
    assert align_calls(first, call_digests(first), call_digests(first)) is first


def test_calls_with_different_outputs_keep_their_numbers() -> None:
    first, second = step_of(FULL, SLIDING), step_of(FULL, FULL)
    assert align_calls(second, call_digests(second), call_digests(first)) is second


def gathered(rank: Rank) -> Any:
    values = _gather_to_first({"of": torch.full((rank.rank * 1000 + 1,), float(rank.rank))}, rank)
    return values and [(len(value["of"]), float(value["of"].sum())) for value in values]


def test_the_first_rank_of_each_group_gets_what_each_rank_has_in_their_order() -> None:
    with spawn(Topology(tp=2, dp=2), timeout=120) as world:
        first, second, third, fourth = world.run(gathered)
    assert (first, third) == ([(1, 0.0), (1001, 1001.0)], [(2001, 4002.0), (3001, 9003.0)])
    assert second is fourth is None


def gathered_twice(rank: Rank) -> Any:
    return [gathered(rank), gathered(rank)]


def test_what_ranks_send_to_the_first_leaves_all_of_them_at_the_same_number_of_collectives() -> None:
    """Else torch's check of collectives ends the run at the next one."""
    with spawn(Topology(tp=3), timeout=120) as world:
        first, *others = world.run(gathered_twice)
    assert first == [[(1, 0.0), (1001, 1001.0), (2001, 4002.0)]] * 2
    assert others == [[None, None]] * 2
