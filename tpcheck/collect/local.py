"""The part of a tensor that lies on this rank; DTensor is known by its methods, and not imported."""

from __future__ import annotations

import torch


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor (its shard, or its term of a sum), and any other tensor as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a DTensor stands for, and any other tensor as it is. Collective over the DTensor's mesh."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full: torch.Tensor = tensor.full_tensor()
    return full
