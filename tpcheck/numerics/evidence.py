"""What the checks compare (the tensors of both sides of a run), and what they hand over: suspects with typed facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal

from tpcheck.core.clipping import NO_CLIPPING, Clipping
from tpcheck.core.findings import Finding, MarginPhase, ModuleMargins
from tpcheck.core.topology import Topology
from tpcheck.numerics.norms import ClippedStep, GradientNorms, ObservedNorm
from tpcheck.numerics.tolerance import FITTED_RELATIVE_ERROR, RESIDUAL_EXACT, Tolerance

Phase = Literal["forward", "backward"]
LOGGED_LOSS, LOGGED_NORM, LOGGED_RATE, EVALUATION_LOSS = "loss", "grad_norm", "learning_rate", "eval_loss"
"""What the Trainer logs, by its names."""
SKIPPED = "gradients overflow at this loss scale: the reference skips the step"
Role = Literal["input", "output"]


@dataclass(frozen=True, slots=True, order=True)
class TensorKey:
    """Names one input or output of a module.

    Attributes:
        phase: `forward` for activations, `backward` for their gradients.
        module: Name as in `named_modules`; empty for the model itself.
        call: Number of earlier calls of this module in this step.
        role: Whether the tensor is an input or an output of the module.
        path: Place in the module's arguments or outputs, such as `0` or `logits`.
        micro_batch: Number of the micro-batch in its step; calls are counted from 0 in each.
    """

    phase: Phase
    module: str
    call: int
    role: Role
    path: str
    micro_batch: int = 0

    @property
    def place(self) -> str:
        """Where the tensor is, in words, such as `input 0 of block.up`."""
        return f"{self.role} {self.path} of {self.module or 'the model'}"

    def __str__(self) -> str:
        call = f" call {self.call}" if self.call else ""
        what = "gradient of " if self.phase == "backward" else ""
        micro_batch = f", micro-batch {self.micro_batch}" if self.micro_batch else ""
        return f"{self.module or 'model'}{call}: {what}{self.role} {self.path}{micro_batch}"


MarginsByModule = Mapping[tuple[MarginPhase, str], float | None]

Tensor = Any  # a torch.Tensor; this layer does not import torch


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that a rank issued.

    Attributes:
        module: The innermost module whose forward issued it.
        name: As in `torch.distributed`, such as `all_reduce`.
        ranks: Global ranks of its group; empty where they are unknown.
        phase, micro_batch: Of the pass that issued it. The module of one in the backward pass is unknown, and empty.
        position: How many inputs and outputs of modules the rank had recorded before.
        bypasses_autograd: It was called with gradients on and outside of any autograd function, which alone could give
            it a backward pass.
        after: The last one of those.
    """

    module: str
    name: str
    ranks: tuple[int, ...]
    phase: Phase = "forward"
    micro_batch: int = 0
    position: int = 0
    bypasses_autograd: bool = False
    after: TensorKey | None = None


@dataclass(frozen=True, slots=True)
class MicroBatchGradients:
    """What one micro-batch adds to the gradients of a step, which are the sum over its micro-batches.

    Attributes:
        mean: The mean over the DP ranks.
        local: From this DP rank's micro-batch alone.
    """

    mean: Mapping[str, Tensor | None]
    local: Mapping[str, Tensor | None]


@dataclass(frozen=True, slots=True)
class Step:
    """One training step, of one rank of the candidate or of the reference for one DP rank.

    Attributes:
        activations: Inputs and outputs of every module and their gradients, in the order of events.
        gradients: Gradient of each parameter before clipping, averaged over DP; None where there is none.
        weights: Each parameter after the optimizer's step; empty where no optimizer step followed.
        buffers: Each buffer after this DP rank's batch.
        gradient_norm: The norm that clipping used; None where it is unknown.
        loss: The loss of this DP rank's batch; the mean over its micro-batches.
        local_gradients: Gradient of each parameter from this DP rank's batch alone; empty for a candidate, and where
            there is one DP rank.
        micro_gradients: The reference's, by micro-batch; empty where a step has one.
        otherwise_normalised: Gradient of each parameter under the other way to divide the loss: by the labels of the
            step, or by each micro-batch's own. Empty where both are the same.
        optimizer_state: Moments and float32 masters by (state, parameter).
        digests: Digest of the bits of each parameter, gradient and buffer, by (kind, name).
        collectives: Those of the forward and the backward pass, in order; the reference has none.
        logs_collectives: Whether they are known: not those of a compiled model.
        sources: For each activation of the forward pass those nearest before it that it is computed from, as autograd
            knows it; empty for a candidate, and where there are no gradients.
        linear: Those of `sources` in which the activation is linear.
        uses: For each parameter the activations nearest behind it that are computed from it, known as `sources` are.
        logged: What a library's loop logs of the step, and of an evaluation after it, by its names.
        loss_scale: By which the losses of the step were multiplied; gradients of activations still are.
        next_loss_scale: By which those of the next step are; known of the reference.
        is_skipped: Whether the optimizer's step was left out, since gradients overflowed.
    """

    activations: Mapping[TensorKey, Tensor]
    gradients: Mapping[str, Tensor | None]
    weights: Mapping[str, Tensor]
    gradient_norm: float | None
    loss: float
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    local_gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    micro_gradients: tuple[MicroBatchGradients, ...] = ()
    otherwise_normalised: Mapping[str, Tensor | None] = field(default_factory=dict)
    optimizer_state: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    digests: Mapping[tuple[str, str], str] = field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()
    logs_collectives: bool = True
    sources: Mapping[TensorKey, tuple[TensorKey, ...]] = field(default_factory=dict)
    linear: Mapping[TensorKey, tuple[TensorKey, ...]] = field(default_factory=dict)
    uses: Mapping[str, tuple[TensorKey, ...]] = field(default_factory=dict)
    logged: Mapping[str, float] = field(default_factory=dict)
    loss_scale: float = 1.0
    next_loss_scale: float = 1.0
    is_skipped: bool = False

    def without_gradients(self) -> Step:
        """Return the step with nothing that a skipped step leaves unknown: gradients, and the norm."""
        forward = {key: tensor for key, tensor in self.activations.items() if key.phase == "forward"}
        gradients = dict.fromkeys(self.gradients)
        return replace(
            self,
            activations=forward,
            gradients=gradients,
            local_gradients={},
            micro_gradients=(),
            otherwise_normalised={},
            gradient_norm=None,
        )


@dataclass(frozen=True, slots=True)
class RankFacts:
    """Facts of one rank, small enough to be gathered from every rank of the world.

    Attributes:
        group_ranks: The live groups that the rank uses, by axis.
        digests: At the start (parameters and buffers), then after each step (gradients, too), by (kind, name).
    """

    group_ranks: Mapping[str, tuple[tuple[int, ...], ...]]
    digests: tuple[Mapping[tuple[str, str], str], ...]


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """How many labels the losses of one step are means of, and by which number the reference divides.

    Attributes:
        counts: By DP rank, then by micro-batch.
        loss: `mean` where the reference divides each micro-batch's sum by its own count; `token_mean` where it divides
            all sums by the count of the step.
        adds_up: Whether what a micro-batch returns is divided by all labels of the step, so that the sum over
            micro-batches and replicas is the loss; else it is their mean.
    """

    counts: tuple[tuple[int, ...], ...]
    loss: str = "mean"
    adds_up: bool = False

    @property
    def total(self) -> int:
        return sum(map(sum, self.counts))

    def weight(self, dp_rank: int, micro_batch: int) -> float:
        """Return what a micro-batch's own mean is multiplied by to make the mean over all of them one over labels."""
        return self.counts[dp_rank][micro_batch] * sum(map(len, self.counts)) / self.total

    @property
    def differ(self) -> bool:
        """Whether micro-batches have unlike numbers of labels, so that the two ways to divide are not the same."""
        return len({count for of_rank in self.counts for count in of_rank}) > 1


@dataclass(frozen=True, slots=True)
class LabelFacts:
    """The labels behind a wrong loss: of the step, and which micro-batch it is of."""

    step: LabelCounts
    dp_rank: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class ForcedModules:
    """The first step with teacher forcing per module: each module gets its part of the reference's inputs.

    Attributes:
        reference: The reference's step for this DP rank's batch alone.
        candidate: The candidate's steps, by tp_rank: inputs of modules as the module before computed them; gradients of
            parameters from each rank's backward pass, before any reduction.
        forced_inputs: Inputs (and output gradients) that were replaced by the reference's on every rank.
        tolerance: Allowed errors, from replays of the reference with the same forced inputs.
        forced_on_some: Inputs (and output gradients) that were replaced on some ranks, and kept on others.
    """

    reference: Step
    candidate: tuple[Step, ...]
    forced_inputs: frozenset[TensorKey]
    tolerance: Tolerance
    forced_on_some: frozenset[TensorKey] = frozenset()


@dataclass(frozen=True, slots=True)
class Evidence:
    """Both sides of a run, for one TP group.

    Attributes:
        topology: Of the world.
        dp_rank: Which DP replica this TP group is.
        dtype: Name of the dtype of both sides.
        initial: The reference's parameters before the first step.
        initial_parts: Each rank's shards of them, by tp_rank.
        layouts: How each parameter lies over the TP group (`tpcheck.adapters.Layout`).
        reference: The reference's steps, for this DP rank.
        candidate: The candidate's steps: candidate[step][tp_rank].
        buffers: Names of the reference's buffers.
        facts: Of every rank of the world.
        tolerance: Allowed errors.
        forced_modules: The first step with teacher forcing per module; None in a precision that needs none.
        recomputed: Outputs of leaf modules of the reference, recomputed from the candidate's inputs where those are
            wrong in the first step, by tp_rank.
        forced_inputs: Inputs that do not come from the module before, so that results around them say nothing of them.
        lost: The reference's parameters whose values the sharded model holds under no name.
        forced_on_some: Such inputs, on some ranks alone: nothing is recomputed from them.
        computed_alone: Outputs of leaf modules of the reference on each rank's inputs, with the rank's part of the
            parameters, where the actual ones are wrong in the first step, by tp_rank.
        blocks_read: Of a wrong input in the first step, the module whose output, right on all ranks, gives it where its
            fused blocks are read in another order; None where no order does.
        labels: The labels of each step; empty where they cannot be counted.
        on_shards: Each rank's parameters after each step if the optimizer is given shards alone, by step, then by
            tp_rank: what an optimizer whose step on an element depends on the whole matrix must not compute.
        clipping: How the reference clips.
        frozen: Names of the parameters that no step may change.
    """

    topology: Topology
    dp_rank: int
    dtype: str
    initial: Mapping[str, Tensor]
    initial_parts: tuple[Mapping[str, Tensor], ...]
    layouts: Mapping[str, Any]
    reference: tuple[Step, ...]
    candidate: tuple[tuple[Step, ...], ...]
    buffers: tuple[str, ...]
    facts: tuple[RankFacts, ...]
    tolerance: Tolerance
    forced_modules: ForcedModules | None = None
    recomputed: Mapping[TensorKey, tuple[Tensor, ...]] = field(default_factory=dict)
    forced_inputs: frozenset[TensorKey] = frozenset()
    lost: tuple[str, ...] = ()
    forced_on_some: frozenset[TensorKey] = frozenset()
    computed_alone: Mapping[TensorKey, tuple[Tensor, ...]] = field(default_factory=dict)
    blocks_read: Mapping[TensorKey, tuple[str, FusedBlocks] | None] = field(default_factory=dict)
    labels: tuple[LabelCounts, ...] = ()
    on_shards: tuple[tuple[Mapping[str, Tensor], ...], ...] = ()
    clipping: Clipping = NO_CLIPPING
    frozen: frozenset[str] = frozenset()

    def of_forced_modules(self) -> Evidence | None:
        """Return the step with teacher forcing as evidence of a first step; None where there is none."""
        if self.forced_modules is None:
            return None
        return replace(
            self,
            reference=(self.forced_modules.reference,),
            candidate=(self.forced_modules.candidate,),
            tolerance=self.forced_modules.tolerance,
            forced_inputs=self.forced_modules.forced_inputs,
            forced_on_some=self.forced_modules.forced_on_some,
            forced_modules=None,
            recomputed={},
            computed_alone={},
        )

    @property
    def tp_group(self) -> tuple[int, ...]:
        """Global ranks of this TP group."""
        return self.topology.groups("tp")[self.dp_rank]

    def weights_before(self, step: int) -> Mapping[str, Tensor]:
        """Return the reference's parameters during `step`: those after the last optimizer step before it."""
        return next((earlier.weights for earlier in reversed(self.reference[:step]) if earlier.weights), self.initial)

    def parts_before(self, step: int) -> tuple[Mapping[str, Tensor], ...]:
        """Return each rank's shards of the parameters during `step`, by tp_rank."""
        earlier = (tuple(rank.weights for rank in ranks) for ranks in reversed(self.candidate[:step]))
        return next((weights for weights in earlier if any(weights)), self.initial_parts)

    def ranks(self, tp_ranks: tuple[int, ...]) -> list[int]:
        """Return the global ranks of some tp_ranks of this group."""
        return [self.tp_group[tp_rank] for tp_rank in tp_ranks]


@dataclass(frozen=True, slots=True)
class LinearTerms:
    """What a linear module's inputs and weights on the ranks give, in float64.

    Attributes:
        by_rank: Each rank's inputs times its weight, without bias, by tp_rank.
        bias: The full bias; zero where there is none.
        bias_parts: Each rank's part of it, by tp_rank; empty tensors where there is none.
        are_summed: The weight is cut along the features that are summed over, so that the output is the sum of all.
    """

    by_rank: tuple[Tensor, ...]
    bias: Tensor
    bias_parts: tuple[Tensor, ...]
    are_summed: bool

    @property
    def total(self) -> Tensor:
        """The sum of all terms, without bias."""
        return reduce(add, self.by_rank)


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """A lookup in a table of which each rank holds some rows.

    Attributes:
        table: The reference's table.
        shards: Each rank's rows, by tp_rank.
    """

    table: Tensor
    shards: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class LossFacts:
    """A mean cross entropy.

    Attributes:
        expected: The reference's loss.
        actual: Each rank's loss, by tp_rank.
        logits: The expected logits, where the ranks hold shards of the vocabulary.
        logits_parts: Each rank's logits, by tp_rank.
    """

    expected: float
    actual: tuple[float, ...]
    logits: Tensor = None
    logits_parts: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class BackwardFacts:
    """What is known of the backward pass of what stands behind a gradient, or of the module that sends it back.

    Attributes:
        collectives: Names of the collectives that every rank issues there, as in `torch.distributed`.
        unseen: Of those that autograd does not see.
        sums_backward: Whether every rank issues one in the backward pass between the gradients before and this one.
        inputs, outputs, output_gradients: The expected parts of a module with one tensor in and one out, of the same
            shape, by tp_rank; empty for another.
        through_sum: Each rank's part of the expected gradient of logits that goes through the logarithm of the sum of
            exponentials, by tp_rank; the rest goes through the labels. Empty where this is no cross entropy.
        branches: What comes back through each module that takes the tensor, and along a path past them, such as a
            residual, by what it is: the expected parts, by tp_rank. Empty where one alone takes it.
        lost_on: Global ranks to which nothing comes back from a module that takes the tensor.
    """

    collectives: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    sums_backward: bool = False
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    output_gradients: tuple[Tensor, ...] = ()
    through_sum: tuple[Tensor, ...] = ()
    branches: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    lost_on: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GradientFacts:
    """What a wrong gradient of a parameter is compared with, beside the expected one.

    Attributes:
        missing_on: Global ranks that have no gradient, or zeros alone.
        is_every_parameter: Whether the gradients of all parameters are wrong.
        local_parts: Each rank's part of the expected gradient of this DP replica's batch alone, by tp_rank.
        is_reduced_over_tp: Whether all TP ranks hold the same gradient for most shards, which are different ones.
        untied: Gradients of parameters that the reference ties with another one, by name, then by tp_rank.
        uses: Each rank's part of what each use of a module that is called more than once adds, by call, by tp_rank.
        micro_mean, micro_local: Each rank's part of what each micro-batch adds to the expected gradient, by
            micro-batch, then by tp_rank: averaged over DP, and of this DP rank alone.
        otherwise_normalised: Each rank's part of the gradient of the loss divided the other way, by tp_rank.
    """

    missing_on: tuple[int, ...] = ()
    is_every_parameter: bool = False
    local_parts: tuple[Tensor, ...] = ()
    is_reduced_over_tp: bool = False
    untied: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    uses: tuple[tuple[Tensor, ...], ...] = ()
    micro_mean: tuple[tuple[Tensor, ...], ...] = ()
    micro_local: tuple[tuple[Tensor, ...], ...] = ()
    otherwise_normalised: tuple[Tensor, ...] = ()

    def as_evidence(self) -> dict[str, Any]:
        missing = {"missing_on_ranks": list(self.missing_on)} if self.missing_on else {}
        return {**({"every_parameter": True} if self.is_every_parameter else {}), **missing}


@dataclass(frozen=True, slots=True)
class NormFacts:
    """Norms of the candidate's gradients, and by which the step was clipped.

    Attributes:
        norms: Of each parameter on each rank.
        expected: The reference's norm.
        reported: The norm that each rank reports, by tp_rank; empty where the backend reports none.
        implied: The norm by which each rank's step on this parameter was clipped, by tp_rank; empty where unknown.
        step: By what the gradients of all parameters were multiplied; None where it is unknown.
        scales: Numbers by which gradients are multiplied before they are unscaled, by what they are.
        noise: Relative error by which two computations of one norm differ.
        tolerance: Relative error up to which two norms may be the same number, in this dtype.
    """

    norms: GradientNorms
    expected: float
    reported: tuple[float, ...] = ()
    implied: tuple[float, ...] = ()
    step: ClippedStep | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    noise: float = FITTED_RELATIVE_ERROR
    tolerance: float = FITTED_RELATIVE_ERROR

    @property
    def clipping(self) -> Clipping:
        return NO_CLIPPING if self.step is None else self.step.clipping

    @property
    def clips_otherwise_than_reported(self) -> bool:
        """Whether the norms that the ranks report would have given another step than the right norm."""
        expected = self.clipping.factor(self.expected)
        return any(abs(self.clipping.factor(norm) - expected) > RESIDUAL_EXACT * expected for norm in self.reported)

    @property
    def of_reported(self) -> ObservedNorm:
        """What the ranks report, as a norm to be explained."""
        return self._observed(self.reported, noise=self.noise)

    @property
    def of_implied(self) -> ObservedNorm:
        """The norm that the step on this parameter was clipped by, as one to be explained."""
        of_step = self._observed(self.implied, noise=FITTED_RELATIVE_ERROR, least=self.clipping.max_norm)
        return replace(of_step, shown_by_step=not self.of_reported.is_wrong)

    def _observed(self, used: tuple[float, ...], *, noise: float, least: float = 0.0) -> ObservedNorm:
        return ObservedNorm(used, self.expected, noise, self.tolerance, least, self.scales, self.clipping)

    def as_evidence(self) -> dict[str, Any]:
        return {
            **({"norm_implied": list(self.implied)} if self.implied else {}),
            "norm_of_each_rank_alone": list(self.norms.of_ranks),
            "norm_of_each_ranks_shards": list(self.norms.of_ranks_shards),
            "norm_with_replicas_counted": self.norms.counting_replicas,
            **({} if self.clipping.is_torchs else {"clipping": str(self.clipping)}),
        }


@dataclass(frozen=True, slots=True)
class StepFacts:
    """An optimizer's step on one parameter.

    Attributes:
        before: Each rank's part of the expected weight before the step, by tp_rank.
        momentum_parts: Each rank's part of the expected move of the step before, by tp_rank; empty where there is no
            momentum, or the parts cannot be exchanged.
        momentum_share: Share of that move in the expected move of this step.
        ratios: For each term of the step (gradient, weight, momentum) its share on each rank over the expected share.
        ratio_digits: How many digits of them are known.
        on_shards: Each rank's weight after the step if the optimizer is given its shards alone; empty where unknown.
        loss_scale, next_loss_scale: By which the losses of the step were multiplied, and those of the next one.
        skipped_on: Global ranks of this TP group that skipped a step which the reference takes.
        unlike_masters_on: Global ranks whose weight is not their float32 master, rounded.
    """

    before: tuple[Tensor, ...] = ()
    momentum_parts: tuple[Tensor, ...] = ()
    momentum_share: float = 0.0
    ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ratio_digits: int = 6
    on_shards: tuple[Tensor, ...] = ()
    loss_scale: float = 1.0
    next_loss_scale: float = 1.0
    skipped_on: tuple[int, ...] = ()
    unlike_masters_on: tuple[int, ...] = ()

    def known_digits(self, ratios: Iterable[float]) -> list[float]:
        """Return the ratios without the digits that rounding has made, so that those of one mistake are the same."""
        return [float(f"{ratio:.{self.ratio_digits}g}") for ratio in ratios]

    def as_evidence(self) -> dict[str, Any]:
        ratios = {f"{term}_ratio": self.known_digits(ratios) for term, ratios in self.ratios.items()}
        return {**({"skipped_on_ranks": list(self.skipped_on)} if self.skipped_on else {}), **ratios}


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What is known of replicas that differ.

    Attributes:
        num_differing: How many tensors differ on these ranks, by kind (parameter, gradient, buffer).
        differ_over_dp: Replicas over DP differ after the step.
        differed_at_start: Replicas differed before the first step.
        gradients_differ: The gradients of replicas differ.
    """

    num_differing: Mapping[str, int] = field(default_factory=dict)
    differ_over_dp: bool = False
    differed_at_start: bool = False
    gradients_differ: bool = False

    def as_evidence(self) -> dict[str, Any]:
        return {
            **{f"{kind}s": number for kind, number in self.num_differing.items()},
            **({"replicas_over_dp_differ": True} if self.differ_over_dp else {}),
            **({"differed_at_start": True} if self.differed_at_start else {}),
            **({"gradients_differ": True} if self.gradients_differ else {}),
        }


@dataclass(frozen=True, slots=True)
class SiblingCollectives:
    """The collectives of a module where they are not those of its sibling layers: (name, global ranks) in order.

    Attributes:
        issued: On the first rank where they differ.
        expected: What most siblings issued.
        as_in: Which of them did.
    """

    issued: tuple[tuple[str, tuple[int, ...]], ...]
    expected: tuple[tuple[str, tuple[int, ...]], ...]
    as_in: str

    def as_evidence(self) -> dict[str, Any]:
        issued, expected = (
            [{"name": name, "ranks": list(ranks)} for name, ranks in collectives]
            for collectives in (self.issued, self.expected)
        )
        return {"collectives": issued, "collectives_expected": expected, "collectives_as_in": self.as_in}


@dataclass(frozen=True, slots=True)
class FusedBlocks:
    """An output that agrees block by block, and is read in another order by the module that follows.

    Attributes:
        number: How many blocks.
        error: Relative error of the output, block by block.
    """

    number: int
    error: float

    def as_evidence(self) -> dict[str, Any]:
        return {"fused_blocks": self.number, "fused_blocks_error": self.error}


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """Sizes of a parameter and of its shards, by tp_rank, along the dim that is cut."""

    dim: int
    size: int
    shard_sizes: tuple[int, ...]

    def as_evidence(self) -> dict[str, Any]:
        return {"dim": self.dim, "size": self.size, "shard_sizes": list(self.shard_sizes)}


@dataclass(frozen=True, slots=True)
class SiblingWeights:
    """Names of the parameters beside a wrong one, in the same parent module: the wrong and the right ones."""

    wrong: tuple[str, ...]
    right: tuple[str, ...]

    def as_evidence(self) -> dict[str, Any]:
        return {"beside_it": {"wrong": list(self.wrong), "right": list(self.right)}}


Kind = Literal[
    "activation",
    "input_gradient",
    "gradient",
    "weight",
    "update",
    "norm",
    "replica",
    "group",
    "sharding",
    "lost",
    "state",
    "master",
    "logged",
]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A failed comparison whose cause is not yet known.

    Attributes:
        check, where, observed, allowed, evidence: As in `Finding`.
        kind: What sort of tensor this is.
        role: Whether an activation, or its gradient, is an input or an output of a module.
        expected: The reference's full tensor, where there is one.
        actual: The full tensor that the ranks' parts make up, where a layout says how.
        actual_parts: Each rank's part, by tp_rank.
        expected_parts: What each rank's part should be, by tp_rank; empty where it is unknown.
        is_replicated: Whether every rank should hold the full tensor.
        allowed_error: Largest absolute Frobenius error that passes.
        num_replicas: Number of data-parallel replicas.
        computed_alone: What each rank's part of the module would compute by itself, by tp_rank; empty where unknown.
        has_cut_matrices: Whether the module has matrices that are cut over the ranks.
        addends: What may be added to a sum over the ranks to make the tensor, and every rank has whole and right:
            parameters of the module, and tensors that this one is computed from; by what they are.
        others: The reference's other tensors of this kind, by name: the full one, then what each rank should hold.
        cut: Returns what each rank should hold of a full tensor of this shape, by tp_rank; None where it is unknown.
        tp_group: Global ranks by tp_rank.

    The other attributes are facts of the module, parameter or step, None where the check does not know them.
    """

    check: str
    where: Mapping[str, Any]
    observed: float
    allowed: float
    kind: Kind
    evidence: Mapping[str, Any] = field(default_factory=dict)
    role: Role | None = None
    expected: Tensor = None
    actual: Tensor = None
    actual_parts: tuple[Tensor, ...] = ()
    expected_parts: tuple[Tensor, ...] = ()
    is_replicated: bool = False
    allowed_error: float = 0.0
    num_replicas: int = 1
    others: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    cut: Callable[[Tensor], Sequence[Tensor]] | None = None
    tp_group: tuple[int, ...] = ()
    linear: LinearTerms | None = None
    embedding: EmbeddingFacts | None = None
    loss: LossFacts | None = None
    labels: LabelFacts | None = None
    gradient: GradientFacts = GradientFacts()
    backward: BackwardFacts = BackwardFacts()
    computed_alone: tuple[Tensor, ...] = ()
    has_cut_matrices: bool = False
    addends: Mapping[str, Tensor] = field(default_factory=dict)
    norms: NormFacts | None = None
    step: StepFacts = StepFacts()
    replicas: ReplicaFacts = ReplicaFacts()
    collectives: SiblingCollectives | None = None
    fused_blocks: FusedBlocks | None = None
    shards: ShardFacts | None = None
    siblings: SiblingWeights | None = None

    @property
    def parameter(self) -> str | None:
        """Name of the parameter; None where this is no parameter's tensor."""
        return self.where.get("parameter")

    def facts_as_evidence(self) -> dict[str, Any]:
        """Return the facts by the names that they have in a finding's evidence."""
        facts = (
            self.gradient, self.step, self.norms, self.replicas, self.collectives, self.fused_blocks, self.shards,
            self.siblings,
        )  # fmt: skip
        return {name: value for known in facts if known is not None for name, value in known.as_evidence().items()}


@dataclass(frozen=True, slots=True)
class WayOutcome:
    """The result of one way to make, or to resume, a training: explained as it is found.

    Attributes:
        margins: Observed / allowed error of every comparison, by name; infinite where an exact one failed.
        findings: What differs.
        not_compared: Why something could not be compared, by name.
    """

    margins: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    not_compared: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """The result of one check, at one step or at the start.

    Attributes:
        margins: Observed / allowed error of every comparison, by name; 0 for exact agreement.
        suspects: Comparisons that failed, the most telling first.
        not_compared: Why something could not be compared, by name.
        by_module: The worst of the margins by the phase and module that they are of; None where a module was called and
            nothing of it could be compared.
        compared_only: What alone was compared, where nothing was of what the check is about; else empty.
    """

    margins: Mapping[str, float] = field(default_factory=dict)
    suspects: tuple[Suspect, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    by_module: MarginsByModule = field(default_factory=dict)
    compared_only: str = ""

    def or_else(self, other: CheckOutcome) -> CheckOutcome:
        """Add what else was compared; its suspects follow from those of this outcome, where it has any."""
        return replace(
            self,
            margins={**self.margins, **other.margins},
            suspects=self.suspects or other.suspects,
            not_compared={**self.not_compared, **other.not_compared},
            by_module={**self.by_module, **other.by_module},
        )

    def beside(self, other: CheckOutcome) -> CheckOutcome:
        """Add what else was compared, with its suspects after those of this outcome."""
        return replace(self.or_else(other), suspects=(*self.suspects, *other.suspects))

    def with_forced_modules(
        self, margins: Mapping[str, float], suspects: Iterable[Suspect], by_module: MarginsByModule
    ) -> CheckOutcome:
        """Add the results of teacher forcing per module; its suspects replace those of the ordinary pass."""
        forced = {f"{name}, with teacher forcing": margin for name, margin in margins.items()}
        replaced = tuple(replace(suspect, evidence={**suspect.evidence, "isolated": True}) for suspect in suspects)
        return replace(
            self,
            margins={**self.margins, **forced},
            suspects=replaced or self.suspects,
            by_module=worst_by_module(self.by_module, by_module),
        )


def worst_by_module(*margins: MarginsByModule) -> MarginsByModule:
    """Return the largest margin of each phase and module, in the order of the first that has it."""
    worst: dict[tuple[MarginPhase, str], float | None] = {}
    for of_modules in margins:
        for key, margin in of_modules.items():
            known = worst.get(key)
            worst[key] = known if margin is None else margin if known is None else max(known, margin)
    return worst


def modules_of(margins: MarginsByModule) -> tuple[ModuleMargins, ...]:
    """Return the margins as those of modules, in their order."""
    phases: tuple[MarginPhase, ...] = ("forward", "backward", "weights")
    names = dict.fromkeys(module for _, module in margins)
    return tuple(ModuleMargins(name, *(margins.get((phase, name)) for phase in phases)) for name in names)
