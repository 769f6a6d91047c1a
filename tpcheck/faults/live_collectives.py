"""Collectives for faults to make a mess of: gradients pass through them as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def with_value(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value`, whose gradient goes to `tensor` as it is."""
    result: Tensor = _WithValue.apply(tensor, value)  # type: ignore[no-untyped-call]
    return result


def all_reduced(tensor: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum over the group."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op, group=group)
    return with_value(tensor, total)


def all_gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """Return every rank's tensor, all of one shape; gradients end here."""
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return parts


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        ctx.shape = tensor.shape
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        fits = gradients[0].shape == ctx.shape
        return gradients[0] if fits else gradients[0].new_zeros(ctx.shape), None
