"""The one place that decides which part of a tensor lies on this rank, whether it is a DTensor or a plain tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def local_tensor(tensor: torch.Tensor, placements: Sequence[Any] | None = None) -> torch.Tensor:
    """Return this rank's part of a DTensor, and a plain tensor as it is.

    A dim of the mesh over which the tensor is `Partial` is reduced: the terms of a sum mean nothing one by one. Every
    other dim keeps its placement, so that a batch that FSDP shards stays sharded. Without `placements` and without a
    sum the result shares the memory of the DTensor.

    Collective over the mesh where the tensor has to be redistributed. FSDP2 over TP gives parameters a `_StridedShard`
    on the data-parallel dim, which `redistribute` gathers in the right order; `to_local` alone would not.

    Args:
        tensor: Any tensor.
        placements: Lay the DTensor out like this first, a `Partial` as `Replicate`; by default as it is.
    """
    current = getattr(tensor, "placements", None)
    if current is None:
        return tensor
    wanted = reduced(current if placements is None else placements)
    if wanted != tuple(current):
        tensor = tensor.redistribute(placements=wanted)  # type: ignore[attr-defined]
    local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


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
