"""Trains the unsharded model as data parallelism would, and replays it under perturbed rounding."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite

import torch
from torch import nn

from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.sgd import Sgd, clip_gradients
from tpcheck.core.errors import UsageError
from tpcheck.model.batches import Batch, copied
from tpcheck.model.build import loss_of
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import Step, TensorKey
from tpcheck.numerics.perturb import nothing_raised, perturbed_leaves
from tpcheck.numerics.recorder import ModuleRecorder
from tpcheck.numerics.snapshots import State, buffers_of, parameters_of, set_buffers, set_parameters

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
    optimizer = Sgd(list(model.parameters()), options, clip_gradients)
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
    optimizer: Sgd,
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
            local_gradients=own_gradients if len(own) > 1 else {},
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


Deviations = Mapping[Hashable, float]  # Frobenius distance of each tensor from the reference's


def replayed_deviations(
    model: nn.Module,
    start: tuple[State, State],
    batches: Batches,
    options: TrainingOptions,
    expected: Sequence[ReferenceStep],
    *,
    eps: float,
    seed: int,
) -> Deviations:
    """Train once more from `start` (parameters, buffers) with leaf modules perturbed by `eps`; measure every tensor."""
    parameters, buffers = start
    set_parameters(model, parameters)
    set_buffers(model, buffers)
    deviations: dict[Hashable, float] = {}

    def measure(step: int, dp_rank: int, key: TensorKey, tensor: torch.Tensor) -> None:
        reference = expected[step][dp_rank].activations.get(key)
        with nothing_raised():
            distance = float("inf") if reference is None else frobenius_distance(tensor, reference)
        deviations[step, dp_rank, key] = distance

    generator = torch.Generator().manual_seed(seed)
    with perturbed_leaves(model, eps=eps, generator=generator):
        steps = train(model, batches, options, measure)
    with nothing_raised():
        for index, (step, reference_step) in enumerate(zip(steps, expected, strict=True)):
            deviations.update(_common(index, step[0], reference_step[0]))
            deviations[index, "norm"] = _norm_deviation(step[0], reference_step[0], generator if eps else None)
            for dp_rank, (one, reference) in enumerate(zip(step, reference_step, strict=True)):
                deviations.update(_own(index, dp_rank, one, reference))
    return deviations


def require_still(deviations: Deviations) -> None:
    """Raise UsageError where a replay without any perturbation moved: nothing could be told from such noise."""
    moved = next((key for key, deviation in deviations.items() if deviation), None)
    if moved is not None:
        name = " ".join(str(part) for part in moved) if isinstance(moved, tuple) else str(moved)
        raise UsageError("build", name, "a model that computes the same each time from the same weights and batch")


def _common(index: int, step: Step, reference: Step) -> dict[Hashable, float]:
    """Return how far what is common to all DP ranks moved."""
    deviations: dict[Hashable, float] = {}
    for name, expected in reference.gradients.items():
        actual = step.gradients[name]
        if expected is not None and actual is not None:
            deviations[index, "gradient", name] = frobenius_distance(actual, expected)
    for name, expected_weight in reference.weights.items():
        deviations[index, "weight", name] = frobenius_distance(step.weights[name], expected_weight)
    return deviations


def _own(index: int, dp_rank: int, step: Step, reference: Step) -> dict[Hashable, float]:
    """Return how far what is of one DP rank moved."""
    deviations: dict[Hashable, float] = {(index, dp_rank, "loss"): abs(step.loss - reference.loss)}
    for name, expected in reference.buffers.items():
        if name in step.buffers:
            deviations[index, dp_rank, "buffer", name] = frobenius_distance(step.buffers[name], expected)
    return deviations


def _norm_deviation(step: Step, reference: Step, generator: torch.Generator | None) -> float:
    """Return how far the norm moved, summed in a random order where there is a generator, as sharded norms are."""
    assert step.gradient_norm is not None
    assert reference.gradient_norm is not None
    if generator is None:
        return abs(step.gradient_norm - reference.gradient_norm)
    elements = torch.cat([gradient.reshape(-1) for gradient in step.gradients.values() if gradient is not None])
    elements = elements.to(torch.promote_types(elements.dtype, torch.float32))
    order = torch.randperm(len(elements), generator=generator).to(elements.device)
    return abs(float(torch.linalg.vector_norm(elements[order])) - reference.gradient_norm)
