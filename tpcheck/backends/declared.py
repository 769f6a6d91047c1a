"""Layouts that a user declares, checked against what the rank really holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from math import prod

import torch
from torch.distributed.tensor import DTensor

from tpcheck.adapters import Layout
from tpcheck.adapters.protocols import RankLike
from tpcheck.errors import UsageError
from tpcheck.placement import Placement, Replicate, Shard

Shape = tuple[int, ...]
LayoutSource = Mapping[str, Placement] | Callable[[str, Shape], Placement | None] | None


def declared_layouts(
    source: LayoutSource, parameters: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape], rank: RankLike
) -> dict[str, Layout]:
    """Return the layout of every parameter that is no DTensor.

    Args:
        source: What the user says.
        parameters: What this rank holds.
        shapes: The shapes of the unsharded model.
        rank: Where it runs.

    Raises:
        UsageError: The layout does not fit the shapes, or names no parameter.
    """
    plain = {name: one for name, one in parameters.items() if name in shapes and not isinstance(one.data, DTensor)}
    if isinstance(source, Mapping):
        _require_used(source, parameters)
    found = {}
    for name, parameter in plain.items():
        placement = _placement(source, name, shapes[name])
        found[name] = layout_of(name, placement, shapes[name], rank.topology.tp)
        tp_rank = rank.topology.coordinate(rank.rank)["tp"]
        if tuple(parameter.shape) != found[name].local_shapes[tp_rank]:
            raise UsageError(
                f"layout[{name!r}]",
                placement,
                f"one that gives rank {rank.rank} the shape it holds, {tuple(parameter.shape)}, of "
                f"{shapes[name]} over tp={rank.topology.tp}; this one gives {found[name].local_shapes[tp_rank]}",
            )
    return found


def layout_of(name: str, placement: Placement, shape: Shape, tp: int) -> Layout:
    """Return a placement as an exact layout.

    Raises:
        UsageError: The shape has no such dim or blocks, or a parameter is said to be a sum.
    """
    if isinstance(placement, Replicate):
        return Layout.replicated(shape, tp)
    if not isinstance(placement, Shard):
        raise UsageError(f"layout[{name!r}]", placement, "tpcheck.placement.Shard or Replicate")
    if not -len(shape) <= placement.dim < len(shape):
        raise UsageError(f"layout[{name!r}]", placement, f"a dim of {shape}")
    ids = torch.arange(prod(shape)).reshape(shape)
    parts = [_part(ids, placement, tp, tp_rank) for tp_rank in range(tp)]
    places = torch.empty(prod(shape), dtype=torch.int64)
    places[torch.cat([part.reshape(-1) for part in parts])] = torch.arange(prod(shape))
    return Layout(shape, tuple(tuple(part.shape) for part in parts), places)


def _part(ids: torch.Tensor, shard: Shard, tp: int, tp_rank: int) -> torch.Tensor:
    dim = shard.dim % ids.dim()
    held = [index for indices in shard.ranges(ids.shape[dim], tp, tp_rank) for index in indices]
    return ids.index_select(dim, torch.tensor(held, dtype=torch.int64))


def _placement(source: LayoutSource, name: str, shape: Shape) -> Placement:
    if callable(source):
        return source(name, shape) or Replicate()
    for pattern, placement in (source or {}).items():
        if fnmatchcase(name, pattern):
            return placement
    return Replicate()


def _require_used(source: Mapping[str, Placement], parameters: Mapping[str, torch.Tensor]) -> None:
    for pattern in source:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UsageError("layout", pattern, f"a pattern of parameter names, such as {next(iter(parameters), '*')}")
