"""Which part of a tensor is on this rank, for DTensors and plain tensors, and data put back after a gathering."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def local_part(tensor: torch.Tensor, placements: Sequence[Any] | None = None) -> torch.Tensor:
    """Return this rank's part of a DTensor, and a plain tensor as it is.

    Dims of the mesh over which the tensor is `Partial` are reduced, since a single term of a sum has no meaning. Every
    other dim keeps its placement: a tensor that is sharded over DP and a sum over TP stays sharded over DP.

    Where nothing is redistributed, the result shares the memory of the DTensor. Otherwise collective over its mesh.

    Args:
        tensor: Any tensor.
        placements: Redistribute the DTensor to these first, with `Replicate` in place of `Partial`; by default to its
            placements. `redistribute` gathers the `_StridedShard` that FSDP2 over TP gives parameters in their order.
    """
    current = getattr(tensor, "placements", None)
    if current is None:
        return tensor
    wanted = reduced(current if placements is None else placements)
    if wanted != tuple(current):
        tensor = tensor.redistribute(placements=wanted)  # type: ignore[attr-defined]
    local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def local_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of this rank's TP shard, which ZeRO 3 keeps in `ds_shape` while it partitions the data."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def reduced(placements: Sequence[Any]) -> tuple[Any, ...]:
    """Return DTensor placements with `Replicate` in place of each `Partial`."""
    from torch.distributed.tensor import Replicate  # takes time to import, and no plain tensor needs it

    return tuple(Replicate() if placement.is_partial() else placement for placement in placements)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor that a DTensor stands for, and a plain tensor as it is. Collective over its mesh."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full: torch.Tensor = tensor.full_tensor()
    return full


@contextmanager
def restored_data(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Put the data of the parameters back on leaving."""
    saved = [(parameter, parameter.data) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data
