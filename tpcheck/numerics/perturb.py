"""Replays a model under random rounding (Monte Carlo arithmetic at leaf modules), with everything in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tpcheck.numerics.tensors import map_tensors

# Methods that ask for float32 by name rather than by a dtype argument.
_RAISED = {torch.Tensor.float: torch.Tensor.double}


class _RaiseFloat32(TorchFunctionMode):
    """Models cast to float32 inside (norms, softmax, rotary tables); the cast would be the largest error of a run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = _RAISED.get(func, func)
        return func(*(_raised(arg) for arg in args), **{name: _raised(value) for name, value in (kwargs or {}).items()})


def _raised(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def everything_in_float64(enabled: bool = True) -> Iterator[None]:
    """Make float64 the default dtype and the answer to every request for float32, while inside.

    Backward passes are covered too: hooks and autograd functions that run in them.
    """
    if not enabled:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _RaiseFloat32() as mode, _on_in_backward(mode):
            yield
    finally:
        torch.set_default_dtype(default)


def nothing_raised() -> AbstractContextManager[None]:
    """Return a context in which requests are answered as they are, at a fifth of the cost of a small tensor's call.

    For what names its dtypes: comparing tensors, and sending them.
    """
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


@contextmanager
def _on_in_backward(mode: TorchFunctionMode) -> Iterator[None]:
    """Keep `mode` on while the autograd engine runs.

    `backward` dispatches to the mode, and a mode is off while it answers; the engine hands the modes that are on when
    it starts to the hooks that it calls.
    """
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def with_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run_backward(*args, **kwargs)

    with patch.object(torch.autograd, "_engine_run_backward", with_mode):
        yield


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
