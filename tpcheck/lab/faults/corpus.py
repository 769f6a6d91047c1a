"""All faults, in the order of their tables, and the clean controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tpcheck.core.topology import Topology
from tpcheck.lab.faults import (
    averaging,
    checkpoint,
    column_parallel,
    data,
    gradients,
    heads,
    input_gradients,
    layout,
    norms,
    partial_gradients,
    precision,
    replicas,
    row_parallel,
    steps,
    vocabulary,
)
from tpcheck.lab.faults.checkpoint import CheckpointFault
from tpcheck.lab.faults.data import DataFault
from tpcheck.lab.faults.fault import ModelFault

MODEL_FAULTS: tuple[ModelFault, ...] = (
    *row_parallel.FAULTS,
    *column_parallel.FAULTS,
    *vocabulary.FAULTS,
    *layout.FAULTS,
    *heads.FAULTS,
    *input_gradients.FAULTS,
    *partial_gradients.FAULTS,
    *gradients.FAULTS,
    *replicas.FAULTS,
    *norms.FAULTS,
    *averaging.FAULTS,
    *steps.FAULTS,
    *precision.FAULTS,
)
CHECKPOINT_FAULTS: tuple[CheckpointFault, ...] = checkpoint.FAULTS
DATA_FAULTS: tuple[DataFault, ...] = data.FAULTS

Fault = ModelFault | CheckpointFault | DataFault
FAULTS: tuple[Fault, ...] = (*MODEL_FAULTS, *DATA_FAULTS, *CHECKPOINT_FAULTS)


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "opt", "gpt_neox", "starcoder2")
LAYOUTS = (
    (Topology(tp=2), 0),
    (Topology(tp=4), 0),
    (Topology(tp=2), 1),
    (Topology(tp=2, dp=2), 0),
    (Topology(tp=2, dp=2), 1),
    (Topology(tp=2, dp=2), 2),
    (Topology(tp=2, dp=2), 3),
)


@dataclass(frozen=True, slots=True)
class Control:
    """A small model in which nothing is planted."""

    family: str
    topology: Topology = field(default_factory=lambda: Topology(tp=2))
    zero_stage: int = 0


def quick() -> Iterator[Control]:
    """Yield every family once, and every layout once."""
    for family in FAMILIES:
        yield Control(family)
    for number, (topology, zero_stage) in enumerate(LAYOUTS[1:]):
        yield Control(FAMILIES[number % len(FAMILIES)], topology, zero_stage)


def drawn(families: Sequence[str], seed: int) -> Iterator[Control]:
    """Yield every family once, each in another layout for the next seed: in all of them after as many seeds."""
    for number, family in enumerate(families):
        topology, zero_stage = LAYOUTS[(number + seed) % len(LAYOUTS)]
        yield Control(family, topology, zero_stage)


def zero_stage_at(dtype: str, zero_stage: int) -> int:
    """Return the ZeRO stage at which a dtype is right.

    Without ZeRO, DeepSpeed 0.19.8 clips bfloat16 gradients by the norm of TP rank 0's shards alone: a bug, no control.
    """
    return max(1, zero_stage) if dtype == "bfloat16" else zero_stage
