"""Trains the unsharded model as data parallelism would, and measures how far rounding alone moves each tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, nan
from typing import Any, Protocol

import torch
from torch import nn

from tpcheck.backends.interface import RankLike, TrainingOptions
from tpcheck.backends.loss_scale import LossScale
from tpcheck.backends.sgd import Sgd, clip_by_convention
from tpcheck.core.clipping import Clipping
from tpcheck.core.cuda import uses_cuda
from tpcheck.core.errors import UsageError
from tpcheck.model.build import Batch, batch_size, build_model, copy_batch, loss_of, make_batches
from tpcheck.model.implementations import run_eagerly
from tpcheck.model.labels import (
    COUNT,
    batch_with_labels,
    label_counts,
    labels_name,
    loss_module,
    loss_times,
    takes_count,
    with_a_label,
    with_counts,
)
from tpcheck.model.optimizer_state import optimizer_state
from tpcheck.model.options import Request
from tpcheck.numerics.data_flow import DataFlow
from tpcheck.numerics.differences import frobenius, frobenius_distance
from tpcheck.numerics.evidence import (
    EVALUATION_LOSS,
    LOGGED_LOSS,
    LOGGED_NORM,
    LOGGED_RATE,
    LabelCounts,
    MicroBatchGradients,
    Step,
    TensorKey,
)
from tpcheck.numerics.perturb import (
    Deviations,
    Perturbation,
    first_nonzero,
    named_deviations,
    perturbed_leaves,
    perturbed_replay,
)
from tpcheck.numerics.precision import reduced_precision_raised, torch_function_disabled
from tpcheck.numerics.recorder import ModuleRecorder
from tpcheck.numerics.tensors import (
    State,
    copy_buffers,
    copy_parameters,
    restore_buffers,
    restore_parameters,
    state_restored,
)
from tpcheck.numerics.tolerance import SAFETY_FACTOR, Tolerance, largest_deviations

ReferenceStep = tuple[Step, ...]  # by DP rank; what is common to all ranks is the same object in each
Gradients = dict[str, torch.Tensor | None]
Recording = Callable[[int, int, int], AbstractContextManager[Any]]  # step, dp_rank, micro-batch -> of one pass


class CommunicatingRank(RankLike, Protocol):
    """A rank that can exchange objects with all others."""

    def gather(self, value: Any) -> tuple[Any, ...]: ...


@dataclass(frozen=True, slots=True)
class Reference:
    """The unsharded model.

    Attributes:
        model: The model itself.
        batches: What both sides are trained on: batches[step][dp_rank][micro_batch].
        weighing: How its losses are weighted.
        options: How both sides train.
        parameters, buffers: What both sides start from.
        replays: How many perturbed replays measure the tolerance.
        seed: Seed of the replays.
    """

    model: nn.Module
    batches: list[list[list[Batch]]]
    weighing: Weighing
    options: TrainingOptions
    parameters: State
    buffers: State
    replays: int
    seed: int

    @classmethod
    def build(cls, request: Request, rank: RankLike, options: TrainingOptions) -> Reference:
        model = build_model(request, rank.device)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError("build", type(model).__name__, "a model with a parameter that requires a gradient")
        run_eagerly(model)
        data = make_batches(request.options, model, rank.topology.dp, rank.device, options.accumulate)
        options = replace(options, batch_size=batch_size(data[0][0][0]))
        labels = label_counts(model, data, options.loss)
        if options.loop != "plain":
            options = replace(options, batches=data)
        if options.loss == "token_mean" and takes_count(model, batch_with_labels(data)):
            sums = options.loop != "plain"  # the Trainer divides by all labels of the step, and multiplies by dp
            labels = tuple(replace(of_step, adds_up=sums) for of_step in labels)
            data = with_counts(data, labels)
            weighing = Weighing(labels, share=rank.topology.dp if sums else None)
        elif options.loss == "token_mean":
            weighing = Weighing(labels, loss_module(model, batch_with_labels(data)))
        else:
            weighing = Weighing(labels)
        return cls(
            model=model,
            batches=data,
            weighing=weighing,
            options=options,
            parameters=copy_parameters(model),
            buffers=copy_buffers(model),
            replays=request.options.replays,
            seed=request.options.seed,
        )

    @property
    def labels(self) -> tuple[LabelCounts, ...]:
        """The labels of each step; empty where they cannot be counted."""
        return self.weighing.labels

    @property
    def first_share(self) -> float:
        """What the loss of a micro-batch of the first step is multiplied by before its backward pass."""
        return self.weighing.share_of(len(self.batches[0][0]))

    @property
    def state(self) -> State:
        return {**self.parameters, **self.buffers}

    def train(
        self, rank: CommunicatingRank, tolerance: Tolerance | None = None
    ) -> tuple[list[ReferenceStep], Tolerance]:
        """Train, and measure the tolerance with replays that the ranks share between them. Collective.

        Args:
            tolerance: Of this training, where it is known.

        Raises:
            UsageError: The model does not compute the same each time.
        """
        steps = train_recorded(self.model, self.batches, self.options, self.weighing)
        if tolerance is not None:
            return steps, tolerance

        def replay(perturbation: Perturbation) -> Deviations:
            self.restore()
            return _replay_training(self, steps, perturbation)

        before = _random_states()
        measured = self._share_of_replays(rank, replay)
        draws = any(not torch.equal(*states) for states in zip(before, _random_states(), strict=True))
        moved = [name for name in rank.gather(self._not_repeated(measured.get(0, {}), steps, draws)) if name]
        if moved:
            raise UsageError(
                "build", moved[0], "a model that computes the same each time from the same weights and batch"
            )
        return steps, self._gather_tolerance(rank, measured)

    def _not_repeated(self, unperturbed: Deviations, steps: Sequence[ReferenceStep], draws: bool) -> str:
        """Return the first tensor that a replay without perturbation has not repeated; empty where it may differ.

        Kernels that add in another order each time, as many do on GPUs, round otherwise: the first tensor that differs
        does so by rounding, what comes after follows from it, and all of it is part of what is allowed.

        Args:
            unperturbed: How far tensors moved.
            draws: Whether random numbers were drawn: then it is no rounding, however small.
        """
        moved = first_nonzero(unperturbed)
        if moved is None:
            return ""
        recorded = _recorded(steps, moved)
        if recorded is not None and not draws:
            with torch_function_disabled():
                rounding = SAFETY_FACTOR * torch.finfo(self.options.dtype).eps * frobenius(recorded)
            if unperturbed[moved] <= rounding:
                return ""
        return " ".join(map(str, moved))

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
        perturbations = {number: Perturbation.of_replay(number, self.options.dtype, self.seed) for number in numbers}
        return {number: each.of_rounding(replay(each)) for number, each in perturbations.items()}

    def _gather_tolerance(self, rank: CommunicatingRank, measured: dict[int, Deviations]) -> Tolerance:
        by_rank = rank.gather(largest_deviations(measured.values()))
        scalar_eps = torch.finfo(torch.promote_types(self.options.dtype, torch.float32)).eps
        return Tolerance(scalar_eps, self.replays, largest_deviations(by_rank))


def decay_flags(model: nn.Module, options: TrainingOptions) -> list[bool] | None:
    """Return whether the weights of each parameter that needs a gradient decay; None for all."""
    if options.decayed_parameters is None:
        return None
    decayed = options.decayed_parameters(model)
    return [name in decayed for name, parameter in model.named_parameters() if parameter.requires_grad]


@dataclass(frozen=True, slots=True)
class Weighing:
    """How the losses of micro-batches are weighted.

    Attributes:
        labels: The labels of each step; empty where they cannot be counted.
        module: The module whose loss is multiplied by its share of the labels. None where none is: all count alike, or
            the model divides by the number that it is given.
        share: What a micro-batch's loss is multiplied by before its backward pass; None for one over their number.
    """

    labels: tuple[LabelCounts, ...] = ()
    module: str | None = None
    share: float | None = None

    def share_of(self, num_micro_batches: int) -> float:
        """Return what a micro-batch's loss is multiplied by before its backward pass."""
        return 1 / num_micro_batches if self.share is None else self.share

    def evaluated(self, batch: Batch, number: int) -> Batch:
        """Return a micro-batch of the last step as an evaluation gives it to the model."""
        if self.share is None:
            return batch
        return {**batch, COUNT: torch.tensor(float(sum(of_rank[number] for of_rank in self.labels[-1].counts)))}

    @contextmanager
    def applied(self, model: nn.Module, batch: Batch, step: int, dp_rank: int, micro_batch: int) -> Iterator[Batch]:
        """Weigh the loss of a micro-batch while inside; yield what the model is called with."""
        if self.module is None:
            yield batch
            return
        of_step = self.labels[step]
        name = labels_name(batch)
        if not of_step.counts[dp_rank][micro_batch] and name is not None:
            batch = with_a_label(batch, name)
        with loss_times(model, of_step.weight(dp_rank, micro_batch), self.module):
            yield batch


def train(
    model: nn.Module,
    batches: Sequence[Sequence[Sequence[Batch]]],
    options: TrainingOptions,
    recording: Recording,
    weighing: Weighing | None = None,
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[ReferenceStep]:
    """Train on the micro-batches of all DP ranks and return each step, without activations.

    Args:
        batches: batches[step][dp_rank][micro_batch].
        recording: Returns the context for the forward and backward pass of a (step, dp_rank, micro_batch).
        evaluating: Returns the context of the evaluation that a loop of a library's runs after the last step.

    Raises:
        UsageError: The loss is not finite, or there is none.
    """
    weighing = weighing or Weighing()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    clip = clip_by_convention(options.clipping)
    optimizer = Sgd(list(model.parameters()), options, clip, decay_flags(model, options), names)
    buffers: list[State] = [copy_buffers(model)] * len(batches[0])
    loss_scale = LossScale(1.0) if options.loss_scale is None else options.loss_scale()
    steps = []
    for index, by_dp_rank in enumerate(batches):
        losses: list[float] = []
        gradients: list[list[Gradients]] = []
        for dp_rank, micro_batches in enumerate(by_dp_rank):
            restore_buffers(model, buffers[dp_rank])
            of_rank: list[Gradients] = []
            loss = 0.0
            for number, batch in enumerate(micro_batches):
                with (
                    weighing.applied(model, batch, index, dp_rank, number) as weighed,
                    recording(index, dp_rank, number),
                ):
                    share = weighing.share_of(len(micro_batches))
                    loss += _forward_and_backward(model, weighed, share, loss_scale.scale)
                of_rank.append(_pop_gradients(model))
            losses.append(loss)
            buffers[dp_rank] = copy_buffers(model)
            gradients.append(of_rank)
        labels = weighing.labels[index] if weighing.labels else None
        rate = optimizer.learning_rate
        of_ranks = _step(model, optimizer, losses, buffers, gradients, labels, loss_scale.scale)
        loss_scale.update(of_ranks[0].is_skipped)
        of_ranks = tuple(replace(of_rank, next_loss_scale=loss_scale.scale) for of_rank in of_ranks)
        steps.append(of_ranks if options.loop == "plain" else _with_log(of_ranks, rate))
    if options.loop != "plain":
        evaluated = {EVALUATION_LOSS: _evaluation_loss(model, batches[-1], weighing, evaluating)}
        steps[-1] = tuple(replace(of_rank, logged={**of_rank.logged, **evaluated}) for of_rank in steps[-1])
    return steps


def _with_log(step: ReferenceStep, rate: float) -> ReferenceStep:
    """Add what the Trainer logs of a step: the mean of the replicas' losses, the norm, and the rate of the step."""
    norm = step[0].gradient_norm
    logged = {LOGGED_LOSS: sum(of_rank.loss for of_rank in step) / len(step), LOGGED_RATE: rate}
    logged |= {} if norm is None else {LOGGED_NORM: norm}
    return tuple(replace(of_rank, logged=logged) for of_rank in step)


def _evaluation_loss(
    model: nn.Module,
    by_dp_rank: Sequence[Sequence[Batch]],
    weighing: Weighing,
    evaluating: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Return the loss of an evaluation on the batches of the last step, as the Trainer has it.

    It is the mean over the batches of all DP ranks, each divided by the labels of the batches of its number, where the
    model divides by what it is given. One without labels has no mean, and is left out.
    """
    losses = []
    model.eval()
    with state_restored(model), torch.no_grad(), evaluating():
        for number, batches in enumerate(zip(*by_dp_rank, strict=True)):
            for batch in batches:
                output = model(**copy_batch(weighing.evaluated(batch, number)))
                losses.append(float(loss_of(output, with_gradient=False)))
    model.train()
    share = 1.0 if weighing.share is None else weighing.share
    finite = [loss * share for loss in losses if isfinite(loss)]
    return sum(finite) / len(finite) if finite else nan


def train_recorded(
    model: nn.Module,
    batches: Sequence[Sequence[Sequence[Batch]]],
    options: TrainingOptions,
    weighing: Weighing | None = None,
) -> list[ReferenceStep]:
    """Train, and return each step with a copy of every activation."""
    activations: dict[tuple[int, int], dict[TensorKey, torch.Tensor]] = {}
    flows: dict[tuple[int, int], DataFlow] = {}

    def recording(step: int, dp_rank: int, micro_batch: int) -> ModuleRecorder:
        kept = activations.setdefault((step, dp_rank), {})
        flow = flows.setdefault((step, dp_rank), DataFlow())
        recorder = ModuleRecorder(model, lambda key, tensor: kept.__setitem__(key, tensor.clone()), flow=flow)
        recorder.begin_micro_batch(micro_batch)
        return recorder

    def recorded(step: int, dp_rank: int) -> dict[str, Any]:
        flow = flows[step, dp_rank]
        uses = {name: tuple(flow.uses.get(parameter, ())) for name, parameter in model.named_parameters()}
        known = {"sources": flow.sources, "linear": flow.linear, "uses": uses}
        return {"activations": activations[step, dp_rank], **known}

    steps = train(model, batches, options, recording, weighing)
    return [
        tuple(_without_overflow(replace(of_rank, **recorded(index, dp_rank))) for dp_rank, of_rank in enumerate(step))
        for index, step in enumerate(steps)
    ]


def _without_overflow(step: Step) -> Step:
    return step.without_gradients() if step.is_skipped else step


def loss_times_factor(loss: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the product, in float32 for float16, where it would overflow."""
    if factor == 1:
        return loss
    return (loss.float() if loss.dtype is torch.float16 else loss) * factor


def _forward_and_backward(model: nn.Module, batch: Batch, share: float, scale: float) -> float:
    """Return the share of the loss that is the micro-batch's, after the backward pass of that times the scale."""
    loss = loss_of(model(**copy_batch(batch)))
    loss_times_factor(loss, share * scale).backward()  # type: ignore[no-untyped-call]
    if not isfinite(value := float(loss.detach()) * share):
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
    shares: Sequence[Sequence[Gradients]],
    labels: LabelCounts | None,
    scale: float,
) -> ReferenceStep:
    """Take one step with the gradients of each micro-batch, shares[dp_rank][micro_batch], unless some overflow.

    Args:
        scale: By which losses, and with them these gradients, are multiplied.
    """
    number = len(shares[0])
    totals = [_sum(of_rank) for of_rank in shares]
    gradients: Gradients = {}
    for name, parameter in model.named_parameters():
        gradient = gradients[name] = _mean([of_rank[name] for of_rank in totals])
        parameter.grad = None if gradient is None else gradient.clone()  # which the optimizer clips in place
    is_skipped = scale != 1 and not all(map(_is_finite, gradients.values()))
    norm = None
    if is_skipped:
        _pop_gradients(model)
    else:
        with reduced_precision_raised(next(model.parameters()).dtype is torch.float64):
            norm = optimizer.step(scale)
    weights = copy_parameters(model)
    state = optimizer_state(model, optimizer)
    has_replicas = len(losses) > 1
    means = [
        {name: _mean([of_rank[micro][name] for of_rank in shares]) for name in gradients}
        for micro in range(number if number > 1 else 0)
    ]
    otherwise = _otherwise_normalised(shares, labels)

    def unscaled(gradients: Gradients) -> Gradients:
        return gradients if scale == 1 else {name: _in_float32(each, scale) for name, each in gradients.items()}

    return tuple(
        Step(
            {},
            unscaled(gradients),
            weights,
            norm,
            loss,
            buffers=after,
            local_gradients=unscaled(total) if has_replicas else {},
            micro_gradients=(
                tuple(map(MicroBatchGradients, map(unscaled, means), map(unscaled, of_rank))) if number > 1 else ()
            ),
            otherwise_normalised=unscaled(otherwise),
            optimizer_state=state,
            loss_scale=scale,
            is_skipped=is_skipped,
        )
        for loss, after, total, of_rank in zip(losses, buffers, totals, shares, strict=True)
    )


def _is_finite(gradient: torch.Tensor | None) -> bool:
    return gradient is None or bool(gradient.isfinite().all())


def _in_float32(gradient: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    """Return a gradient divided by the scale that keeps it from vanishing in its own dtype."""
    return None if gradient is None else gradient.float() / scale


def _otherwise_normalised(shares: Sequence[Sequence[Gradients]], labels: LabelCounts | None) -> Gradients:
    """Return the gradient of the loss divided the other way: by all labels of the step, or by each one's own count."""
    if labels is None or not labels.differ:
        return {}
    weights = [
        [labels.weight(dp_rank, micro) for micro in range(len(of_rank))] for dp_rank, of_rank in enumerate(shares)
    ]
    if labels.loss == "token_mean" and not all(map(all, weights)):
        return {}  # a mean over no labels does not exist
    factors = [[1 / weight if labels.loss == "token_mean" else weight for weight in of_rank] for of_rank in weights]
    totals = [
        _sum([_scaled(each, factor) for each, factor in zip(of_rank, of_factors, strict=True)])
        for of_rank, of_factors in zip(shares, factors, strict=True)
    ]
    return {name: _mean([total[name] for total in totals]) for name in totals[0]}


def _scaled(gradients: Gradients, factor: float) -> Gradients:
    if factor == 1:
        return gradients
    return {name: None if gradient is None else gradient * factor for name, gradient in gradients.items()}


def _sum(gradients: Sequence[Gradients]) -> Gradients:
    """Return the sum of gradients by name; None where none has one."""
    if len(gradients) == 1:
        return gradients[0]
    present = {name: [each[name] for each in gradients if each[name] is not None] for name in gradients[0]}
    return {name: sum(terms[1:], terms[0]) if terms else None for name, terms in present.items()}  # type: ignore[type-var]


def _mean(by_dp_rank: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the mean over the DP ranks; one that has no gradient counts as zeros."""
    present = [gradient for gradient in by_dp_rank if gradient is not None]
    if len(by_dp_rank) == 1:
        return by_dp_rank[0]
    return sum(present[1:], present[0]) / len(by_dp_rank) if present else None


def _random_states() -> list[torch.Tensor]:
    """Return the states of torch's default generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if uses_cuda() else [])]


def _recorded(steps: Sequence[ReferenceStep], key: tuple[Hashable, ...]) -> torch.Tensor | None:
    """Return the tensor of a deviation, if it is an activation, its gradient, or a parameter's gradient."""
    match key:
        case (int(step), int(dp_rank), TensorKey() as activation):
            return steps[step][dp_rank].activations.get(activation)
        case (int(step), "gradient", str(name)):
            return steps[step][0].gradients.get(name)
    return None


def _replay_training(reference: Reference, expected: Sequence[ReferenceStep], perturbation: Perturbation) -> Deviations:
    """Train once more under random rounding, and return how far every tensor moved."""
    model = reference.model
    deviations: Deviations = {}

    def recording(step: int, dp_rank: int, micro_batch: int) -> AbstractContextManager[None]:
        activations = expected[step][dp_rank].activations
        return perturbed_replay(model, perturbation, activations, deviations, step, dp_rank, micro_batch=micro_batch)

    evaluating = partial(perturbed_leaves, model, perturbation)
    steps = train(model, reference.batches, reference.options, recording, reference.weighing, evaluating)
    with torch_function_disabled():
        for index, (step, expected_step) in enumerate(zip(steps, expected, strict=True)):
            deviations |= _step_deviations(index, step, expected_step)
            deviations[index, "norm"] = _norm_deviation(step[0], expected_step[0], perturbation)
    return deviations


def _step_deviations(index: int, step: ReferenceStep, expected: ReferenceStep) -> Deviations:
    """Return how far gradients, weights, losses and buffers moved."""
    deviations: dict[Hashable, float] = named_deviations(step[0].gradients, expected[0].gradients, index, "gradient")
    deviations |= named_deviations(step[0].weights, expected[0].weights, index, "weight")
    states = (step[0].optimizer_state, expected[0].optimizer_state)
    deviations |= {(index, "state", *key): frobenius_distance(states[0][key], states[1][key]) for key in states[1]}
    for dp_rank, (of_rank, expected_of_rank) in enumerate(zip(step, expected, strict=True)):
        deviations[index, dp_rank, "loss"] = abs(of_rank.loss - expected_of_rank.loss)
        deviations |= named_deviations(of_rank.buffers, expected_of_rank.buffers, index, dp_rank, "buffer")
    for name, value in expected[0].logged.items():
        deviations[index, "logged", name] = abs(step[0].logged[name] - value)
    return deviations


def _norm_deviation(step: Step, expected: Step, perturbation: Perturbation) -> float:
    """Return how far the norm moved; summed in a random order if there is a perturbation, as sharded norms are."""
    if step.gradient_norm is None or expected.gradient_norm is None:  # of a step that one of them skipped
        return 0.0
    if not perturbation.eps:
        return abs(step.gradient_norm - expected.gradient_norm)
    elements = torch.cat([gradient.reshape(-1) for gradient in step.gradients.values() if gradient is not None])
    elements = elements.to(torch.promote_types(elements.dtype, torch.float32))
    order = torch.randperm(len(elements), generator=perturbation.generator).to(elements.device)
    return abs(float(torch.linalg.vector_norm(elements[order])) - expected.gradient_norm)
