"""Calls that ranks make in another order are compared with their counterparts."""

import torch

from tpcheck.model.rank_run import call_digests, renumbered
from tpcheck.numerics.evidence import Step, TensorKey

FULL, SLIDING = torch.tensor([1.0]), torch.tensor([2.0])


def step_of(*outputs: torch.Tensor) -> Step:
    keys = [TensorKey("forward", "rotary", call, "output", "0") for call in range(len(outputs))]
    activations = {**dict(zip(keys, outputs, strict=True)), TensorKey("forward", "once", 0, "output", "0"): FULL}
    return Step(activations, {}, {}, None, 0.0)


def test_calls_are_numbered_as_on_the_first_rank() -> None:
    first, other = step_of(FULL, SLIDING, FULL), step_of(SLIDING, FULL, FULL)
    moved = renumbered(other, call_digests(other), call_digests(first))
    assert {key: float(tensor) for key, tensor in moved.activations.items()} == {
        key: float(tensor) for key, tensor in first.activations.items()
    }


def test_the_same_order_is_left_as_it_is() -> None:
    first = step_of(FULL, SLIDING)
    assert renumbered(first, call_digests(first), call_digests(first)) is first


def test_other_calls_are_left_to_the_comparison() -> None:
    first, other = step_of(FULL, SLIDING), step_of(FULL, FULL)
    assert renumbered(other, call_digests(other), call_digests(first)) is other
