"""What `record` writes of a run, and how it is read: one folder, for each rank JSON lines and safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tpcheck.core.topology import Topology
from tpcheck.numerics.optimizer_view import ParameterGroup
from tpcheck.numerics.sketch import Sketch

Kind = Literal[
    "output",
    "output_gradient",
    "input",
    "input_gradient",
    "gradient",
    "accumulated",
    "weight",
    "master",
    "state",
    "buffer",
]


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to take a rank's part as part of a whole tensor.

    Attributes:
        label: `layout` where the layout is known (from a backend, or DTensor placements); else a guess that
            `tpcheck compare` decides by the other run's shapes: `whole`, or `dim N`, a cut of dim N in the order of
            ranks.
        shape: Shape of the whole tensor; -1 for a dim of rows that are keyed by content.
        piece: Names the elements: equal on ranks that hold the same ones (replicas). Different pieces do not overlap.
        is_term: The values are a term of a sum over the ranks of the TP group (`Partial`).
        sketch: Of this rank's elements, at their global indices.
        order: In which the slices of a sequence are taken to follow each other over the ranks of a CP group, as in
            `PassRecord.sliced`; empty where the reading does not depend on it.
        deviation: Largest distance of this sketch from that of a perturbed replay; None where none was made.
    """

    label: str
    shape: tuple[int, ...]
    piece: str
    sketch: Sketch
    is_term: bool = False
    deviation: float | None = None
    order: str = ""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of one step on one rank. What a module does in several micro-batches is summed.

    Attributes:
        kind: What it is. `weight` is after the optimizer's step (in `RankTrace.initial`: before the first), `gradient`
            what the optimizer gets, `accumulated` the gradient before micro-batch number `part`, `state` a moment.
        name: Module, parameter or buffer, without wrappers.
        part: Place in a module's output (`0`, `logits`), name of an optimizer's state (`exp_avg`); else empty.
        call: Number of earlier calls of the module in the micro-batch.
        dtype: Such as `float32`.
        shape: Of this rank's part.
        digest: Of the bits of this rank's part, over all micro-batches.
        readings: One, or several where it is unknown how the part lies in the whole.
        full: This rank's part itself, where it was recorded with tensors="full"; of several micro-batches a list.
        digest_before: Of a state as the optimizer got it, where the recorded step before had left another; else empty.
    """

    kind: Kind
    name: str
    part: str
    call: int
    dtype: str
    shape: tuple[int, ...]
    digest: str
    readings: tuple[Reading, ...]
    full: Sequence[torch.Tensor] = ()
    digest_before: str = ""

    @property
    def key(self) -> tuple[Kind, str, str, int]:
        """What it is called on every rank and in every run."""
        return (self.kind, self.name, self.part, self.call)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor that the model was called with.

    Attributes:
        name: Place in the arguments: `input_ids`, or `0`.
        dtype: Such as `int64`.
        shape: Its shape.
        digest: Of its bits.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One call of the model.

    Attributes:
        leaves: The tensors that it was called with.
        samples: Digest of the content of each sample, by its place in the batch; empty where there is no batch dim.
            Of a rank that has slices of samples, those of the slices.
        loss: The loss that the model returned; None where it returned none.
        has_backward: Whether a backward pass followed.
        is_training: `model.training`.
        generators: Digests of the states of the generators before the call, by name (`torch`, `cuda`).
        generators_after: The same after it; a forward pass that draws random numbers leaves another state.
        sliced: Where the ranks of a CP group hold slices, for each order that these may follow each other in
            (`contiguous`, `zigzag`, `positions`) the digests of the whole samples.
        pieces: For each sample or slice, the digests of its equal pieces, 8 hex digits each, joined.
        positions: Which positions the ranks of a CP group were called with: those of an order, or `from 0 on each
            rank`; empty where there were none, or others.
    """

    leaves: tuple[Leaf, ...]
    samples: tuple[str, ...]
    loss: float | None
    has_backward: bool
    is_training: bool = True
    generators: Mapping[str, str] = field(default_factory=dict)
    generators_after: Mapping[str, str] = field(default_factory=dict)
    sliced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pieces: tuple[str, ...] = ()
    positions: str = ""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything between two steps of the optimizer, on one rank.

    Attributes:
        number: Number of optimizer steps that the run took before it, since the recording began.
        has_update: Whether an optimizer step ended it; False for what is left at the end of the recording.
        passes: Calls of the model with a backward pass, in order.
        tensors: In the order of events: outputs, gradients of outputs, gradients, weights, states.
        groups: Of all optimizers.
        gradient_norm: 2-norm over this rank's own gradients as the optimizer gets them (a part of the whole norm).
        reported_norm: The norm that the loop or the engine says it clipped by; None where none is known.
        loss_scale: By which losses are multiplied; 1 without.
        is_skipped: The optimizer's step was skipped because of infinite gradients.
        num_evaluations: Calls of the model without a backward pass, which are not recorded.
        autocast: The dtype of autocast in its passes; empty without.
    """

    number: int
    has_update: bool
    passes: tuple[PassRecord, ...]
    tensors: tuple[TensorRecord, ...]
    groups: tuple[ParameterGroup, ...] = ()
    gradient_norm: float | None = None
    reported_norm: float | None = None
    loss_scale: float = 1.0
    is_skipped: bool = False
    num_evaluations: int = 0
    autocast: str = ""


@dataclass(frozen=True, slots=True)
class RankTrace:
    """What one rank recorded.

    Attributes:
        rank: Global.
        topology: Of the run. TP and DP coordinates of the rank follow from it.
        tp_group: Global ranks of its TP group, in the order of tp_rank.
        dp_group: Global ranks of its DP group.
        dtype: Of the parameters, or of autocast where that is in use.
        versions: By package.
        replays: How many perturbed replays each recorded step has.
        source: What was recorded: `Module`, `DistributedDataParallel`, `DeepSpeedEngine` ...
        initial: Weights, buffers and optimizer state before the first recorded step.
        steps: The recorded ones; of a trace that was read, each is read when it is asked for.
        num_steps: Steps of the optimizer while recording, recorded or not.
        not_recorded: Why something could not be recorded, by name.
        is_complete: Whether the context ended; False for a run that was killed.
        world_size: Ranks of the run; more than the topology has where no library knows all axes.
        cp_group: Global ranks that hold slices of its sequences, in the order of cp_rank; empty where there is one.
        order: In which the slices are read, which the other run's samples tell; empty where there are none.
        node: Name of the machine that the rank ran on.
    """

    rank: int
    topology: Topology
    tp_group: tuple[int, ...]
    dp_group: tuple[int, ...]
    dtype: str
    versions: Mapping[str, str]
    replays: int
    source: str
    initial: tuple[TensorRecord, ...]
    steps: Sequence[StepRecord]
    num_steps: int
    not_recorded: Mapping[str, str] = field(default_factory=dict)
    is_complete: bool = True
    world_size: int = 0
    cp_group: tuple[int, ...] = ()
    order: str = ""
    node: str = ""

    @property
    def num_ranks(self) -> int:
        return max(self.world_size, self.topology.world_size)
