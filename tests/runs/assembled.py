"""What a view yields over two steps, and the whole tensors that the parts of all ranks make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tpcheck import Rank
from tpcheck.numerics.sketch import GlobalIndex
from tpcheck.runs.optimizer_view import OptimizerView, Part

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
