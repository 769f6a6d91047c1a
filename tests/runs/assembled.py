"""What a view yields over two steps, and the whole tensors that the parts of all ranks make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.backends import hand_made
from tpcheck import Rank
from tpcheck.backends.live_groups import LiveGroups, live_groups
from tpcheck.numerics.optimizer_view import OptimizerView, Part
from tpcheck.numerics.optimizers.choose import view_of
from tpcheck.numerics.sketch import GlobalIndex

Key = tuple[str, str, str]  # kind, parameter, state
Parts = list[Part]


def steps_of(view: OptimizerView, step: Callable[[int], Any], num_steps: int = 2) -> list[Parts]:
    """Return copies of all parts of each step: gradients from the hook, weights and states after it."""
    steps: list[Parts] = []
    for number in range(num_steps):
        parts: Parts = []
        with _hooked(view, parts):
            step(number)
        parts.extend(_copies(view.weights()))
        parts.extend(_copies(view.states()))
        steps.append(parts)
    return steps


@contextmanager
def _hooked(view: OptimizerView, parts: Parts) -> Iterator[None]:
    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if view.owns(optimizer):
            parts.extend(_copies(view.gradients(optimizer)))

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert not view.owns(optimizer) or any(optimizer is known for known in view.stepping)

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copies(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        yield replace(part, values=part.values.clone())


def positions_of(index: GlobalIndex) -> torch.Tensor:
    """Return the flat global position of each present element."""
    if index.positions is not None:
        return index.positions
    flat = torch.zeros((1,) * len(index.shape), dtype=torch.int64)
    stride = 1
    for dim in reversed(range(len(index.shape))):
        known = index.indices[dim]
        along = torch.arange(index.shape[dim]) if known is None else known
        view = [1] * len(index.shape)
        view[dim] = len(along)
        flat = flat + (along * stride).reshape(view)
        stride *= index.shape[dim]
    flat = flat.reshape(-1)
    return flat if index.fragment is None else flat[index.fragment[0] : index.fragment[1]]


def assembled(
    rank: Rank, parts: Parts, layouts: Mapping[str, Callable[[int], GlobalIndex]] | None = None
) -> dict[Key, torch.Tensor]:
    """Return the whole tensors that the parts of all ranks make; replicas must agree. Collective over the world.

    Args:
        layouts: By parameter, the index for a TP rank where views know none; other parts without one must be equal.
    """
    mine = []
    for part in parts:
        index = part.index or part.index_in_shard
        if part.index is None and part.values.dim() and layouts and part.name in layouts:
            index = layouts[part.name](rank.tp_rank)
        if index is None:
            index = GlobalIndex.whole(tuple(part.values.shape))
        values = part.values.to(torch.float64).reshape(-1) * part.scale
        mine.append(((part.kind, part.name, part.state), index.shape, positions_of(index), values, part.is_term))
    by_key: dict[Key, list[Any]] = {}
    for tp_rank, rank_parts in enumerate(rank.gather(mine)):
        for key, *rest in rank_parts:
            by_key.setdefault(key, []).append((tp_rank % rank.topology.tp, *rest))
    return {key: _assembled(key, pieces) for key, pieces in by_key.items()}


def _assembled(key: Key, pieces: list[Any]) -> torch.Tensor:
    shapes = {shape for _, shape, *_ in pieces}
    assert len(shapes) == 1, (key, shapes)
    (shape,) = shapes
    if any(is_term for *_, is_term in pieces):
        sums = {tp_rank: values for tp_rank, _, _, values, _ in pieces}
        return sum(sums.values()).reshape(shape)
    whole = torch.full((max(1, torch.Size(shape).numel()),), torch.nan, dtype=torch.float64)
    for _, _, positions, values, _ in pieces:
        values, positions = values[positions >= 0], positions[positions >= 0]
        seen = ~whole[positions].isnan()
        assert torch.allclose(whole[positions][seen], values[seen], rtol=1e-12, atol=1e-14), ("replicas differ", key)
        whole[positions] = values
    assert not whole.isnan().any(), ("a part is missing", key)
    return whole.reshape(shape)


def assert_same(
    actual: Mapping[Key, torch.Tensor], expected: Mapping[Key, torch.Tensor], rtol: float = 1e-11, atol: float = 1e-13
) -> None:
    """Assert that both have the same tensors."""
    assert sorted(actual) == sorted(expected), sorted(set(actual) ^ set(expected))
    for key, tensor in expected.items():
        assert actual[key].shape == tensor.shape, (key, actual[key].shape, tensor.shape)
        error = (actual[key] - tensor).norm() / tensor.norm().clamp(min=atol)
        assert error <= rtol or (actual[key] - tensor).abs().max() <= atol, (key, float(error))


def built(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = hand_made.Model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return model


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def batch(dp_rank: int, step: int) -> torch.Tensor:
    return hand_made.tokens({"dp": dp_rank}, step)["tokens"]


def train(model: nn.Module, optimizer: Any, dp_ranks: Any, step: int, *, clip: float = 0.0) -> None:
    """Take a step on the mean of the replicas' losses."""
    for dp_rank in dp_ranks:
        (model(batch(dp_rank, step)) / len(dp_ranks)).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def expected_steps(
    rank: Rank,
    model: nn.Module,
    make: Callable[[Any], Any] = adamw,
    train_step: Callable[..., None] = train,
    **how: Any,
) -> list[Parts]:
    """Return the steps of an unsharded run on the batches of all replicas."""
    optimizer = make(model.parameters())
    view = view_of(model, optimizer, groups=alone())
    return steps_of(view, lambda step: train_step(model, optimizer, range(rank.topology.dp), step, **how))


def alone() -> LiveGroups:
    return LiveGroups(0, (0,), (0,), "one rank")


def groups_of(rank: Rank) -> LiveGroups:
    return live_groups(topology=rank.topology)


def assert_whole(rank: Rank, steps: list[Parts], expected: list[Parts], layouts: Any = None, **how: Any) -> None:
    for parts, unsharded in zip(steps, expected, strict=True):
        whole = {(part.kind, part.name, part.state): part.values.double() for part in unsharded}
        assert_same(assembled(rank, parts, layouts), whole, **how)
