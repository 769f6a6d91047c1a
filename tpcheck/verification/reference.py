"""Trains the unsharded model, once to record it and several times perturbed to learn what rounding does to it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tpcheck.adapters import TrainingOptions
from tpcheck.collect import ModuleRecorder, perturbed_leaves
from tpcheck.compare import frobenius_distance
from tpcheck.records import Step, TensorKey
from tpcheck.verification.batches import Batch, copied
from tpcheck.verification.loss import loss_of
from tpcheck.verification.optimizer import ReferenceOptimizer

ActivationSink = Callable[[int, int, TensorKey, torch.Tensor], None]  # step, dp_rank, key, tensor


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """One step of the reference.

    Attributes:
        by_dp_rank: The step as each DP rank should see it; what is common to all is the same object in each.
    """

    by_dp_rank: tuple[Step, ...]


def train(
    model: nn.Module, batches: Sequence[Sequence[Batch]], options: TrainingOptions, sink: ActivationSink
) -> list[ReferenceStep]:
    """Train on the batches of all DP ranks, gradients averaged over them as DP does, and return what each step made.

    The returned steps carry no activations; those go to `sink` as they appear.
    """
    optimizer = ReferenceOptimizer(model, options)
    return [_step(model, optimizer, step, by_dp_rank, sink) for step, by_dp_rank in enumerate(batches)]


def recorded(model: nn.Module, batches: Sequence[Sequence[Batch]], options: TrainingOptions) -> list[ReferenceStep]:
    """Train and keep a copy of every activation."""
    kept: dict[tuple[int, int], dict[TensorKey, torch.Tensor]] = {}

    def keep(step: int, dp_rank: int, key: TensorKey, tensor: torch.Tensor) -> None:
        kept.setdefault((step, dp_rank), {})[key] = tensor.clone()

    steps = train(model, batches, options, keep)
    return [
        ReferenceStep(
            tuple(
                Step(kept.get((index, dp_rank), {}), one.gradients, one.weights, one.gradient_norm, one.loss)
                for dp_rank, one in enumerate(step.by_dp_rank)
            )
        )
        for index, step in enumerate(steps)
    ]


def replayed_deviations(
    model: nn.Module,
    initial: Mapping[str, torch.Tensor],
    batches: Sequence[Sequence[Batch]],
    options: TrainingOptions,
    expected: Sequence[ReferenceStep],
    seed: int,
) -> dict[Hashable, float]:
    """Train once more from `initial` with perturbed leaf modules; return how far each tensor moved (Frobenius)."""
    model.load_state_dict(initial)
    deviations: dict[Hashable, float] = {}

    def measure(step: int, dp_rank: int, key: TensorKey, tensor: torch.Tensor) -> None:
        reference = expected[step].by_dp_rank[dp_rank].activations[key]
        deviations[step, dp_rank, key] = frobenius_distance(tensor, reference)

    generator = torch.Generator().manual_seed(seed)
    with perturbed_leaves(model, eps=torch.finfo(options.dtype).eps, generator=generator):
        steps = train(model, batches, options, measure)
    for index, (step, reference_step) in enumerate(zip(steps, expected, strict=True)):
        _measure_common(index, step.by_dp_rank[0], reference_step.by_dp_rank[0], deviations, generator)
        for dp_rank, (one, reference) in enumerate(zip(step.by_dp_rank, reference_step.by_dp_rank, strict=True)):
            deviations[index, dp_rank, "loss"] = abs(one.loss - reference.loss)
    return deviations


def _measure_common(
    index: int, step: Step, reference: Step, deviations: dict[Hashable, float], generator: torch.Generator
) -> None:
    for name, expected in reference.gradients.items():
        actual = step.gradients[name]
        if expected is not None and actual is not None:
            deviations[index, "gradient", name] = frobenius_distance(actual, expected)
    for name, expected_weight in reference.weights.items():
        deviations[index, "weight", name] = frobenius_distance(step.weights[name], expected_weight)
    assert reference.gradient_norm is not None
    present = [gradient for gradient in step.gradients.values() if gradient is not None]
    deviations[index, "norm"] = abs(_norm_in_random_order(present, generator) - reference.gradient_norm)


def _norm_in_random_order(tensors: Sequence[torch.Tensor], generator: torch.Generator) -> float:
    """Return the norm of all elements, summed in a random order: sharded norms are summed in another order, too."""
    elements = torch.cat([tensor.reshape(-1) for tensor in tensors])
    elements = elements.to(torch.promote_types(elements.dtype, torch.float32))
    order = torch.randperm(len(elements), generator=generator).to(elements.device)
    return float(torch.linalg.vector_norm(elements[order]))


def _step(
    model: nn.Module, optimizer: ReferenceOptimizer, step: int, by_dp_rank: Sequence[Batch], sink: ActivationSink
) -> ReferenceStep:
    losses = []
    for dp_rank, batch in enumerate(by_dp_rank):
        with ModuleRecorder(model, partial(sink, step, dp_rank)):
            loss = loss_of(model(**copied(batch)))
            loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(len(by_dp_rank))
    gradients = {
        name: None if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
    }
    norm = optimizer.step()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return ReferenceStep(tuple(Step({}, gradients, weights, norm, loss) for loss in losses))
