"""Replays a model under random rounding: Monte Carlo arithmetic at the level of leaf modules.

Each leaf module's output, and the gradient that reaches it, is multiplied by 1 + eps * U(-1, 1). How far the tensors
of a step move under that is what rounding alone can do to them. (Parker, "Monte Carlo Arithmetic", 1997; TTrace,
arXiv 2506.09280, perturbs a model's inputs instead.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tpcheck.collect.precision import nothing_raised
from tpcheck.collect.tree import map_tensors


@contextmanager
def perturbed_leaves(model: nn.Module, *, eps: float, generator: torch.Generator) -> Iterator[None]:
    """Perturb the output of every leaf module of `model`, forward and backward, while inside.

    Args:
        model: The model to replay.
        eps: Relative size of the perturbation: the machine epsilon of the dtype that is used.
        generator: Source of the randomness; equal states give equal replays.
    """

    def perturb(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return map_tensors(lambda tensor: _perturbed(tensor, eps, generator), output)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(perturb) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _perturbed(tensor: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    result: torch.Tensor = _Perturb.apply(tensor, eps, generator)  # type: ignore[no-untyped-call]
    return result


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
        ctx.eps, ctx.generator = eps, generator
        return tensor * _factor(tensor, eps, generator)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] * _factor(grads[0], ctx.eps, ctx.generator), None, None


def _factor(tensor: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
    with nothing_raised():
        uniform = torch.rand(tensor.shape, dtype=torch.float64, device=generator.device, generator=generator)
        return (1 + eps * (2 * uniform - 1)).to(device=tensor.device, dtype=tensor.dtype)
