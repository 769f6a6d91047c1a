"""Everything that the checks look at, for one TP group: both sides of a run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tpcheck.records.step import Step
from tpcheck.records.trace import TensorKey
from tpcheck.topology import Topology

Tensor = Any  # a torch.Tensor; this layer does not import torch


class Allowance(Protocol):
    """What error is allowed for a tensor; see `tpcheck.tolerance`."""

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
