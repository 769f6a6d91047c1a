"""Gives tensors another backward pass, for faults of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpcheck.faults.fault import Draw, ModelFault, Planting


def gradient_fault(
    name: str, what: str, draw: Callable[[Draw], Planting], *, causes: tuple[str | None, ...], **options: Any
) -> ModelFault:
    """Return the row of a gradient that is wrong at once."""
    checks = ("gradients_match_reference",)
    return ModelFault(name, "backward", what, draw, checks=checks, causes=causes, **{"steps": 1, **options})


def with_backward(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the tensor as it is, whose gradient goes through `change`."""
    changed: Tensor = _Backward.apply(tensor, change)  # type: ignore[no-untyped-call]
    return changed


class _Backward(torch.autograd.Function):
    """Passes a tensor on as it is, and its gradient through `change`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None
