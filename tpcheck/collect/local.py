"""The part of a tensor that lies on this rank; DTensor is known by its methods, and not imported."""

from __future__ import annotations

import torch


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor, its whole where it is a sum, and any other tensor as it is.

    Collective over the DTensor's mesh where it is a sum: its terms mean nothing to whoever reads them one by one.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor
    if any(placement.is_partial() for placement in placements):
        return whole(tensor)
    local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a DTensor stands for, and any other tensor as it is. Collective over the DTensor's mesh."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full: torch.Tensor = tensor.full_tensor()
    return full
