"""Teacher forcing per module: feeds every module other tensors than its neighbours do, forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tpcheck.numerics.evidence import TensorKey
from tpcheck.numerics.tensors import map_tensors, named_tensors

Replacement = Callable[[TensorKey, torch.Tensor], torch.Tensor]


@contextmanager
def isolated_modules(model: nn.Module, replacement: Replacement) -> Iterator[None]:
    """Hand each module `replacement(key, tensor)` for every floating-point tensor that it is given, while inside.

    Those are its inputs and, in a backward pass, the gradients of its outputs. What it sends back goes to whoever made
    its inputs, as without. Hooks that were there before see what the module was given first.
    """
    isolation = _Isolation(replacement)
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(isolation.before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(isolation.after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Isolation:
    def __init__(self, replacement: Replacement) -> None:
        self._replacement = replacement
        self._calls: Counter[str] = Counter()
        self._open: dict[str, list[int]] = {}

    def before(self, name: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            call = self._calls[name]
            self._calls[name] += 1
            self._open.setdefault(name, []).append(call)
            given = named_tensors((*args, kwargs) if kwargs else args)
            others = {
                id(tensor): self._instead_of(tensor, TensorKey("forward", name, call, "input", path))
                for path, tensor in given
                if tensor.is_floating_point()
            }

            def replaced(tensor: torch.Tensor) -> torch.Tensor:
                return others.get(id(tensor), tensor)

            return map_tensors(replaced, args), map_tensors(replaced, kwargs)

        return hook

    def after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls = self._open.get(name)
            if not calls:  # a backend called the hook without its pre-hook
                return
            call = calls.pop()
            for path, tensor in named_tensors(output):
                if tensor.is_floating_point() and tensor.requires_grad:
                    key = TensorKey("backward", name, call, "output", path)
                    tensor.register_hook(partial(self._replacement, key))  # type: ignore[no-untyped-call]

        return hook

    def _instead_of(self, tensor: torch.Tensor, key: TensorKey) -> torch.Tensor:
        with torch.no_grad():  # checkpointing counts what autograd keeps
            other = self._replacement(key, tensor)
        if other is tensor or not (tensor.requires_grad and torch.is_grad_enabled()):
            return other
        stand_in: torch.Tensor = _StandIn.apply(tensor, other)  # type: ignore[no-untyped-call]
        return stand_in


class _StandIn(torch.autograd.Function):
    """Another tensor in the place of one, to which its gradient goes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other.clone()  # a module may change what it is given in place, which no view out of here allows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


Gradients = Mapping[str, torch.Tensor]

_NOT_CHECKPOINTED = "compatible with .grad()"  # of torch's reentrant checkpointing, in any version, and DeepSpeed's


@contextmanager
def inner_backward(
    model: nn.Module, loss_of: Callable[[Any], torch.Tensor | None], take: Callable[[Gradients], None]
) -> Iterator[None]:
    """Run the backward pass of each call of `model` when its forward pass ends, and `take` its parameters' gradients.

    Autograd is on in the model alone: engines and wrappers around it, which would wait for a backward pass of theirs,
    see one without gradients. Nothing is accumulated, and hooks on accumulation are not called: `take` gets, once for a
    call, what this rank's backward pass alone makes. It is not called where `loss_of` finds no loss in what the model
    returns, or where the model allows no such pass: reentrant activation checkpointing, reversible layers.
    """

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        torch.set_grad_enabled(True)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        loss = loss_of(output)
        gradients = None if loss is None else _gradients(model, loss)
        torch.set_grad_enabled(False)
        if gradients is not None:
            take(gradients)
        return map_tensors(torch.Tensor.detach, output)

    with torch.no_grad():
        handles = [model.register_forward_pre_hook(before, prepend=True), model.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _gradients(model: nn.Module, loss: torch.Tensor) -> Gradients | None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with patch.object(torch.autograd, "backward", _refuse):
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    except _AccumulatesError:
        return None
    except RuntimeError as error:
        if _NOT_CHECKPOINTED in str(error):
            return None
        raise
    return {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


class _AccumulatesError(Exception):
    """A layer runs a backward pass of its own in the backward pass, which accumulates gradients."""


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise _AccumulatesError
