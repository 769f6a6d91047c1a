"""Runs a model's backward pass as part of its forward pass, unseen by what is around the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tpcheck.collect.tree import map_tensors

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
