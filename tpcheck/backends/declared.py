"""Layouts that a user declares, checked against what the rank really holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

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
    if not isinstance(placement, (Shard, Replicate)):
        raise UsageError(f"layout[{name!r}]", placement, "tpcheck.placement.Shard or Replicate")
    if isinstance(placement, Shard) and not -len(shape) <= placement.dim < len(shape):
        raise UsageError(f"layout[{name!r}]", placement, f"a dim of {shape}")
    return Layout.placed(shape, placement, tp)


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
