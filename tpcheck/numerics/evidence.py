"""What the checks look at (the tensors of both sides of a run), and what they answer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tpcheck.core.causes import Cause
from tpcheck.core.topology import Topology

Phase = Literal["forward", "backward"]
Role = Literal["input", "output"]


@dataclass(frozen=True, slots=True, order=True)
class TensorKey:
    """One tensor that went into or came out of a module.

    Attributes:
        phase: `forward` for activations, `backward` for their gradients.
        module: Name as in `named_modules`; empty for the model itself.
        call: How many calls of this module came before, in this step.
        role: Whether the tensor went into the module or came out of it.
        path: Place in the module's arguments or outputs, such as `0` or `logits`.
    """

    phase: Phase
    module: str
    call: int
    role: Role
    path: str

    def __str__(self) -> str:
        call = f" call {self.call}" if self.call else ""
        what = "gradient of " if self.phase == "backward" else ""
        return f"{self.module or 'model'}{call}: {what}{self.role} {self.path}"


Tensor = Any  # a torch.Tensor; this layer does not import torch


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that a rank took part in.

    Attributes:
        module: The innermost module whose forward issued it.
        name: As in `torch.distributed`, such as `all_reduce`.
        ranks: Global ranks of its group; empty where they cannot be told.
    """

    module: str
    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One training step as one rank, or the reference for one DP rank, saw it.

    Attributes:
        activations: What entered and left every module and the gradients of that, in the order of events.
        gradients: Gradient of each parameter before clipping, averaged over DP; None where there is none.
        weights: Each parameter after the optimizer's step; empty where no optimizer step followed.
        buffers: Each buffer after this DP rank's batch.
        gradient_norm: The norm by which the step clipped; None where it is not known.
        loss: The loss of this DP rank's batch.
        own_gradients: Gradient of each parameter from this DP rank's batch alone; empty where there is one DP rank, and
            for a candidate.
        digests: Digest of the bits of each parameter, gradient and buffer, by (kind, name).
        collectives: Those of the forward pass, in order; the reference has none.
    """

    activations: Mapping[TensorKey, Tensor]
    gradients: Mapping[str, Tensor | None]
    weights: Mapping[str, Tensor]
    gradient_norm: float | None
    loss: float
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    own_gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    digests: Mapping[tuple[str, str], str] = field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()


class Allowance(Protocol):
    """What error is allowed for a tensor; see `tpcheck.numerics.tolerance`."""

    @property
    def num_replays(self) -> int: ...

    def allowed(self, key: Hashable, rounding: float) -> float: ...

    def allowed_scalar(self, key: Hashable, expected: float) -> float: ...


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What is small enough to be gathered from every rank of the world.

    Attributes:
        group_ranks: The live groups that the rank uses, by axis.
        digests: Of parameters and buffers at the start, and of those and gradients after each step.
    """

    group_ranks: Mapping[str, tuple[tuple[int, ...], ...]]
    digests: tuple[Mapping[tuple[str, str], str], ...]


@dataclass(frozen=True, slots=True)
class Isolated:
    """The first step's passes once more, each module fed its part of what the reference's was fed.

    Attributes:
        reference: What the reference made of this DP rank's batch alone.
        passes: What entered (as its neighbour gave it) and left every module, by tp_rank; the gradients of parameters
            are those of each rank's backward pass, before anything is reduced.
        fed: What entered modules from the reference, on every rank.
        tolerance: What error is allowed, from replays of the reference fed alike.
    """

    reference: Step
    passes: tuple[Step, ...]
    fed: frozenset[TensorKey]
    tolerance: Allowance


@dataclass(frozen=True, slots=True)
class Evidence:
    """Both sides of a run, for one TP group.

    Attributes:
        topology: Of the world.
        dp_rank: Which DP replica this TP group is.
        dtype: Name of the dtype of both sides.
        initial: The reference's parameters before the first step.
        initial_parts: Each rank's shard of them, by tp_rank.
        layouts: How each parameter lies over the TP group (`tpcheck.adapters.Layout`).
        reference: The reference's steps, for this DP rank.
        candidate: The candidate's steps: candidate[step][tp_rank].
        buffers: Names of the reference's buffers.
        facts: Of every rank of the world.
        tolerance: What error is allowed.
        isolated: The modules one by one; None where precision is high enough to do without.
        remade: What leaf modules of the reference make of inputs that were wrong in the first step, by tp_rank.
        fed: What modules did not get from their neighbours, so that results around them show nothing of it.
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
    tolerance: Allowance
    isolated: Isolated | None = None
    remade: Mapping[TensorKey, tuple[Tensor, ...]] = field(default_factory=dict)
    fed: frozenset[TensorKey] = frozenset()

    def alone(self) -> Evidence | None:
        """Return the modules one by one as evidence of a first step; None where they were not run so."""
        if self.isolated is None:
            return None
        one = self.isolated
        return replace(
            self,
            reference=(one.reference,),
            candidate=(one.passes,),
            tolerance=one.tolerance,
            remade={},
            fed=one.fed,
            isolated=None,
        )

    @property
    def tp_group(self) -> tuple[int, ...]:
        """Global ranks of this TP group."""
        return self.topology.groups("tp")[self.dp_rank]

    def weights_before(self, step: int) -> Mapping[str, Tensor]:
        """Return the reference's parameters as `step` used them: those after the last optimizer step before it."""
        return next((one.weights for one in reversed(self.reference[:step]) if one.weights), self.initial)

    def parts_before(self, step: int) -> tuple[Mapping[str, Tensor], ...]:
        """Return each rank's shards of the parameters as `step` used them, by tp_rank."""
        earlier = (tuple(one.weights for one in ranks) for ranks in reversed(self.candidate[:step]))
        return next((weights for weights in earlier if any(weights)), self.initial_parts)

    def ranks(self, tp_ranks: tuple[int, ...]) -> list[int]:
        """Return the global ranks of some tp_ranks of this group."""
        return [self.tp_group[tp_rank] for tp_rank in tp_ranks]


Kind = Literal["activation", "input_gradient", "gradient", "weight", "update", "norm", "replica", "group", "sharding"]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What each rank's part of a tensor would be under a known mistake.

    Attributes:
        cause: The mistake.
        predicted: What each rank would hold, by tp_rank.
        evidence: What more there is to say of it, by name.
    """

    cause: Cause
    predicted: tuple[Tensor, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Suspect:
    """A failed comparison before its cause is looked for.

    Attributes:
        check, where, observed, allowed, evidence: As in `Finding`.
        kind: What sort of tensor this is.
        expected: The reference's whole tensor, where there is one.
        parts: Each rank's part, by tp_rank.
        expected_parts: What each rank's part should be, by tp_rank; empty where that cannot be said.
        replicated: Whether every rank should hold the whole tensor.
        allowed_error: Largest absolute Frobenius error that passes.
        num_replicas: How many data-parallel replicas there are.
        actual: What the ranks' parts make up, where a layout tells.
        others: Other tensors of the reference of this kind, by name: each whole, then what each rank should hold of it.
        hypotheses: What the parts would be under mistakes that only the check knows enough of to work out.
    """

    check: str
    where: Mapping[str, Any]
    observed: float
    allowed: float
    kind: Kind
    evidence: Mapping[str, Any] = field(default_factory=dict)
    expected: Tensor = None
    parts: tuple[Tensor, ...] = ()
    expected_parts: tuple[Tensor, ...] = ()
    replicated: bool = False
    allowed_error: float = 0.0
    num_replicas: int = 1
    actual: Tensor = None
    others: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    hypotheses: tuple[Hypothesis, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """Answer of one check, at one step or at the start.

    Attributes:
        margins: Observed / allowed error of everything compared, by name; 0 for exact agreement.
        suspects: What failed, the most telling first.
        missed: What could not be compared and why, by name.
    """

    margins: Mapping[str, float] = field(default_factory=dict)
    suspects: tuple[Suspect, ...] = ()
    missed: Mapping[str, str] = field(default_factory=dict)

    def sharpened(self, margins: Mapping[str, float], suspects: Iterable[Suspect]) -> CheckOutcome:
        """Return this answer, of a whole pass, with what modules showed one by one: that goes before it."""
        alone = {f"{name}, in a module by itself": margin for name, margin in margins.items()}
        own = tuple(replace(one, evidence={**one.evidence, "isolated": True}) for one in suspects)
        return replace(self, margins={**self.margins, **alone}, suspects=own or self.suspects)
