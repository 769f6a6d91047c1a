"""Replays the reference under perturbed rounding, to learn how far each of its tensors moves."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import nn

from tpcheck.adapters import TrainingOptions
from tpcheck.collect import nothing_raised, perturbed_leaves
from tpcheck.compare import frobenius_distance
from tpcheck.errors import UsageError
from tpcheck.records import Step, TensorKey
from tpcheck.verification.reference import Batches, ReferenceStep, train
from tpcheck.verification.state import State, set_buffers, set_parameters

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
