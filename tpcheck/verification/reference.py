"""Trains the unsharded model as data parallelism would: each DP rank's batch by itself, gradients averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite

import torch
from torch import nn

from tpcheck.adapters import TrainingOptions
from tpcheck.collect import ModuleRecorder
from tpcheck.errors import UsageError
from tpcheck.records import Step, TensorKey
from tpcheck.verification.batches import Batch, copied
from tpcheck.verification.loss import loss_of
from tpcheck.verification.optimizer import ReferenceOptimizer
from tpcheck.verification.state import State, buffers_of, parameters_of, set_buffers

Batches = Sequence[Sequence[Batch]]  # batches[step][dp_rank]
ReferenceStep = tuple[Step, ...]  # by DP rank; what is common to all ranks is the same object in each
Gradients = Mapping[str, torch.Tensor | None]
ActivationSink = Callable[[int, int, TensorKey, torch.Tensor], None]  # step, dp_rank, key, tensor


def train(model: nn.Module, batches: Batches, options: TrainingOptions, sink: ActivationSink) -> list[ReferenceStep]:
    """Train on the batches of all DP ranks and return what each step made.

    The returned steps carry no activations; those go to `sink` as they appear.

    Raises:
        UsageError: The loss is not finite, or there is none.
    """
    optimizer = ReferenceOptimizer(model, options)
    buffers: list[State] = [buffers_of(model)] * len(batches[0])
    steps = []
    for index, by_dp_rank in enumerate(batches):
        losses = []
        own: list[Gradients] = []
        for dp_rank, batch in enumerate(by_dp_rank):
            set_buffers(model, buffers[dp_rank])
            losses.append(_forward_and_backward(model, batch, partial(sink, index, dp_rank)))
            buffers[dp_rank] = buffers_of(model)
            own.append(_taken_gradients(model))
        steps.append(_stepped(model, optimizer, losses, buffers, own))
    return steps


def recorded(model: nn.Module, batches: Batches, options: TrainingOptions) -> list[ReferenceStep]:
    """Train and keep a copy of every activation."""
    kept: dict[tuple[int, int], dict[TensorKey, torch.Tensor]] = {}

    def keep(step: int, dp_rank: int, key: TensorKey, tensor: torch.Tensor) -> None:
        kept.setdefault((step, dp_rank), {})[key] = tensor.clone()

    steps = train(model, batches, options, keep)
    return [
        tuple(replace(one, activations=kept.get((index, dp_rank), {})) for dp_rank, one in enumerate(step))
        for index, step in enumerate(steps)
    ]


def _forward_and_backward(model: nn.Module, batch: Batch, sink: Callable[[TensorKey, torch.Tensor], None]) -> float:
    with ModuleRecorder(model, sink):
        loss = loss_of(model(**copied(batch)))
        loss.backward()  # type: ignore[no-untyped-call]
    if not isfinite(value := float(loss.detach())):
        raise UsageError("build", f"loss {value}", "a model whose loss is finite: nothing can be compared with it")
    return value


def _taken_gradients(model: nn.Module) -> Gradients:
    """Return the gradients and clear them."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


def _stepped(
    model: nn.Module,
    optimizer: ReferenceOptimizer,
    losses: Sequence[float],
    buffers: Sequence[State],
    own: Sequence[Gradients],
) -> ReferenceStep:
    for name, parameter in model.named_parameters():
        parameter.grad = _mean([gradients[name] for gradients in own])
    gradients = {
        name: None if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
    }
    norm = optimizer.step()
    weights = parameters_of(model)
    return tuple(
        Step(
            {},
            gradients,
            weights,
            norm,
            loss,
            buffers=own_buffers,
            own_gradients=own_gradients if len(own) > 1 else {},
        )
        for loss, own_buffers, own_gradients in zip(losses, buffers, own, strict=True)
    )


def _mean(by_dp_rank: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the mean over the DP ranks; one that has no gradient counts as zeros."""
    present = [gradient for gradient in by_dp_rank if gradient is not None]
    if not present:
        return None
    total = present[0].clone()
    for gradient in present[1:]:
        total += gradient
    return total.div_(len(by_dp_rank))
