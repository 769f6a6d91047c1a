"""Trains the unsharded model as data parallelism would, and measures how far rounding alone moves each tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

import torch
from torch import nn

from tpcheck.backends.interface import RankLike, TrainingOptions
from tpcheck.backends.sgd import Sgd, clip_by_convention
from tpcheck.core.clipping import Clipping
from tpcheck.core.errors import UsageError
from tpcheck.model.build import Batch, batch_size, build_model, copy_batch, loss_of, make_batches
from tpcheck.model.implementations import run_eagerly
from tpcheck.model.options import Request
from tpcheck.numerics.evidence import Step, TensorKey
from tpcheck.numerics.perturb import Deviations, Perturbation, first_nonzero, named_deviations, perturbed_replay
from tpcheck.numerics.precision import torch_function_disabled
from tpcheck.numerics.recorder import ModuleRecorder
from tpcheck.numerics.tensors import State, copy_buffers, copy_parameters, restore_buffers, restore_parameters
from tpcheck.numerics.tolerance import Tolerance, largest_deviations

ReferenceStep = tuple[Step, ...]  # by DP rank; what is common to all ranks is the same object in each
Gradients = dict[str, torch.Tensor | None]
Recording = Callable[[int, int], AbstractContextManager[Any]]  # step, dp_rank -> a context for one pass


class CommunicatingRank(RankLike, Protocol):
    """A rank that can exchange objects with all others."""

    def gather(self, value: Any) -> tuple[Any, ...]: ...


@dataclass(frozen=True, slots=True)
class Reference:
    """The unsharded model.

    Attributes:
        model: The model itself.
        batches: What both sides are trained on: batches[step][dp_rank].
        options: How both sides train.
        parameters, buffers: What both sides start from.
        replays: How many perturbed replays measure the tolerance.
        seed: Seed of the replays.
    """

    model: nn.Module
    batches: list[list[Batch]]
    options: TrainingOptions
    parameters: State
    buffers: State
    replays: int
    seed: int

    @classmethod
    def build(cls, request: Request, rank: RankLike, options: TrainingOptions) -> Reference:
        model = build_model(request, rank.device)
        run_eagerly(model)
        data = make_batches(request.options, model, rank.topology.dp, rank.device)
        return cls(
            model=model,
            batches=data,
            options=replace(options, batch_size=batch_size(data[0][0])),
            parameters=copy_parameters(model),
            buffers=copy_buffers(model),
            replays=request.options.replays,
            seed=request.options.seed,
        )

    @property
    def state(self) -> State:
        return {**self.parameters, **self.buffers}

    def train(self, rank: CommunicatingRank) -> tuple[list[ReferenceStep], Tolerance]:
        """Train, and measure the tolerance with replays that the ranks share between them. Collective.

        Raises:
            UsageError: The model does not compute the same each time.
        """
        steps = train_recorded(self.model, self.batches, self.options)

        def replay(perturbation: Perturbation) -> Deviations:
            self.restore()
            return _replay_training(self.model, self.batches, self.options, steps, perturbation)

        measured = self._share_of_replays(rank, replay)
        unperturbed = next(share for share in rank.gather(measured.pop(0, None)) if share is not None)
        if (moved := first_nonzero(unperturbed)) is not None:
            raise UsageError("build", moved, "a model that computes the same each time from the same weights and batch")
        return steps, self._gather_tolerance(rank, measured)

    def train_clipping_as(
        self, clipping: Clipping, rank: CommunicatingRank
    ) -> tuple[Reference, list[ReferenceStep], Tolerance]:
        """Train once more by another convention; return the reference that does, too. Collective."""
        options = replace(self.options, clip_epsilon=clipping.epsilon, clip_scales_up=clipping.scales_up)
        reference = replace(self, options=options)
        reference.restore()
        return (reference, *reference.train(rank))

    def measure(self, rank: CommunicatingRank, replay: Callable[[Perturbation], Deviations]) -> Tolerance:
        """Return the tolerance for what `replay` measures on this model; the ranks share the replays. Collective."""
        return self._gather_tolerance(rank, self._share_of_replays(rank, replay))

    def restore(self) -> None:
        """Set parameters and buffers back to what both sides start from."""
        restore_parameters(self.model, self.parameters)
        restore_buffers(self.model, self.buffers)

    def _share_of_replays(self, rank: RankLike, replay: Callable[[Perturbation], Deviations]) -> dict[int, Deviations]:
        """Run this rank's share of the replays, by number; replay 0 is not perturbed."""
        numbers = range(rank.rank, 1 + self.replays, rank.topology.world_size)
        return {number: replay(Perturbation.of_replay(number, self.options.dtype, self.seed)) for number in numbers}

    def _gather_tolerance(self, rank: CommunicatingRank, measured: dict[int, Deviations]) -> Tolerance:
        by_rank = rank.gather(largest_deviations(measured.values()))
        scalar_eps = torch.finfo(torch.promote_types(self.options.dtype, torch.float32)).eps
        return Tolerance(scalar_eps, self.replays, largest_deviations(by_rank))


def train(
    model: nn.Module, batches: Sequence[Sequence[Batch]], options: TrainingOptions, recording: Recording
) -> list[ReferenceStep]:
    """Train on the batches of all DP ranks and return each step, without activations.

    Args:
        batches: batches[step][dp_rank].
        recording: Returns the context for the forward and backward pass of a (step, dp_rank).

    Raises:
        UsageError: The loss is not finite, or there is none.
    """
    optimizer = Sgd(list(model.parameters()), options, clip_by_convention(options.clipping))
    buffers: list[State] = [copy_buffers(model)] * len(batches[0])
    steps = []
    for index, by_dp_rank in enumerate(batches):
        losses: list[float] = []
        gradients: list[Gradients] = []
        for dp_rank, batch in enumerate(by_dp_rank):
            restore_buffers(model, buffers[dp_rank])
            with recording(index, dp_rank):
                losses.append(_forward_and_backward(model, batch))
            buffers[dp_rank] = copy_buffers(model)
            gradients.append(_pop_gradients(model))
        steps.append(_step(model, optimizer, losses, buffers, gradients))
    return steps


def train_recorded(
    model: nn.Module, batches: Sequence[Sequence[Batch]], options: TrainingOptions
) -> list[ReferenceStep]:
    """Train, and return each step with a copy of every activation."""
    activations: dict[tuple[int, int], dict[TensorKey, torch.Tensor]] = {}

    def recording(step: int, dp_rank: int) -> ModuleRecorder:
        kept = activations.setdefault((step, dp_rank), {})
        return ModuleRecorder(model, lambda key, tensor: kept.__setitem__(key, tensor.clone()))

    steps = train(model, batches, options, recording)
    return [
        tuple(replace(of_rank, activations=activations[index, dp_rank]) for dp_rank, of_rank in enumerate(step))
        for index, step in enumerate(steps)
    ]


def _forward_and_backward(model: nn.Module, batch: Batch) -> float:
    loss = loss_of(model(**copy_batch(batch)))
    loss.backward()  # type: ignore[no-untyped-call]
    if not isfinite(value := float(loss.detach())):
        raise UsageError("build", f"loss {value}", "a model whose loss is finite: nothing can be compared with it")
    return value


def _pop_gradients(model: nn.Module) -> Gradients:
    """Return the gradients and clear them."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


def _step(
    model: nn.Module,
    optimizer: Sgd,
    losses: Sequence[float],
    buffers: Sequence[State],
    gradients_by_dp_rank: Sequence[Gradients],
) -> ReferenceStep:
    for name, parameter in model.named_parameters():
        parameter.grad = _mean([gradients[name] for gradients in gradients_by_dp_rank])
    gradients = {
        name: None if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
    }
    norm = optimizer.step()
    weights = copy_parameters(model)
    has_replicas = len(losses) > 1
    return tuple(
        Step({}, gradients, weights, norm, loss, buffers=after, local_gradients=of_rank if has_replicas else {})
        for loss, after, of_rank in zip(losses, buffers, gradients_by_dp_rank, strict=True)
    )


def _mean(by_dp_rank: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the mean over the DP ranks; one that has no gradient counts as zeros."""
    present = [gradient for gradient in by_dp_rank if gradient is not None]
    return sum(present[1:], present[0]) / len(by_dp_rank) if present else None


def _replay_training(
    model: nn.Module,
    batches: Sequence[Sequence[Batch]],
    options: TrainingOptions,
    expected: Sequence[ReferenceStep],
    perturbation: Perturbation,
) -> Deviations:
    """Train once more under random rounding, and return how far every tensor moved."""
    deviations: Deviations = {}

    def recording(step: int, dp_rank: int) -> AbstractContextManager[None]:
        activations = expected[step][dp_rank].activations
        return perturbed_replay(model, perturbation, activations, deviations, step, dp_rank)

    steps = train(model, batches, options, recording)
    with torch_function_disabled():
        for index, (step, expected_step) in enumerate(zip(steps, expected, strict=True)):
            deviations |= _step_deviations(index, step, expected_step)
            deviations[index, "norm"] = _norm_deviation(step[0], expected_step[0], perturbation)
    return deviations


def _step_deviations(index: int, step: ReferenceStep, expected: ReferenceStep) -> Deviations:
    """Return how far gradients, weights, losses and buffers moved."""
    deviations: dict[Hashable, float] = named_deviations(step[0].gradients, expected[0].gradients, index, "gradient")
    deviations |= named_deviations(step[0].weights, expected[0].weights, index, "weight")
    for dp_rank, (of_rank, expected_of_rank) in enumerate(zip(step, expected, strict=True)):
        deviations[index, dp_rank, "loss"] = abs(of_rank.loss - expected_of_rank.loss)
        deviations |= named_deviations(of_rank.buffers, expected_of_rank.buffers, index, dp_rank, "buffer")
    return deviations


def _norm_deviation(step: Step, expected: Step, perturbation: Perturbation) -> float:
    """Return how far the norm moved; summed in a random order if there is a perturbation, as sharded norms are."""
    assert step.gradient_norm is not None
    assert expected.gradient_norm is not None
    if not perturbation.eps:
        return abs(step.gradient_norm - expected.gradient_norm)
    elements = torch.cat([gradient.reshape(-1) for gradient in step.gradients.values() if gradient is not None])
    elements = elements.to(torch.promote_types(elements.dtype, torch.float32))
    order = torch.randperm(len(elements), generator=perturbation.generator).to(elements.device)
    return abs(float(torch.linalg.vector_norm(elements[order])) - expected.gradient_norm)
