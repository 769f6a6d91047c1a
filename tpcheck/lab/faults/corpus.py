"""All faults, in the order of their tables, and the clean controls.

A new fault is a row of `FAULTS` in one of these modules; its fields are in `fault.py`, `checkpoint.py`, `data.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpcheck.core.topology import Topology
from tpcheck.lab.faults import (
    backward,
    checkpoint,
    data,
    hand_written,
    heads,
    layout,
    linear,
    optimizer,
    precision,
    replicas,
    vocabulary,
)
from tpcheck.lab.faults.checkpoint import CheckpointFault
from tpcheck.lab.faults.data import DataFault
from tpcheck.lab.faults.fault import TP2, TP2_DP2, TP4, ModelFault
from tpcheck.lab.faults.hand_written import HandWrittenFault

MODEL_FAULTS: tuple[ModelFault, ...] = (
    *linear.FAULTS,
    *vocabulary.FAULTS,
    *layout.FAULTS,
    *heads.FAULTS,
    *backward.FAULTS,
    *replicas.FAULTS,
    *optimizer.FAULTS,
    *precision.FAULTS,
)
CHECKPOINT_FAULTS: tuple[CheckpointFault, ...] = checkpoint.FAULTS
DATA_FAULTS: tuple[DataFault, ...] = data.FAULTS
HAND_WRITTEN_FAULTS: tuple[HandWrittenFault, ...] = hand_written.FAULTS

Fault = ModelFault | HandWrittenFault | CheckpointFault | DataFault
FAULTS: tuple[Fault, ...] = (*MODEL_FAULTS, *HAND_WRITTEN_FAULTS, *DATA_FAULTS, *CHECKPOINT_FAULTS)


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "opt", "gpt_neox", "starcoder2")
LAYOUTS = (
    (TP2, 0),
    (TP4, 0),
    (TP2, 1),
    (TP2_DP2, 0),
    (TP2_DP2, 1),
    (TP2_DP2, 2),
    (TP2_DP2, 3),
)


@dataclass(frozen=True, slots=True)
class Control:
    """A clean run: a small model without an injected fault."""

    family: str
    topology: Topology = TP2
    zero_stage: int = 0


def quick_controls() -> Iterator[Control]:
    """Yield every family once, and every layout once."""
    for family in FAMILIES:
        yield Control(family)
    for number, (topology, zero_stage) in enumerate(LAYOUTS[1:]):
        yield Control(FAMILIES[number % len(FAMILIES)], topology, zero_stage)


def rotated_controls(families: Sequence[str], seed: int) -> Iterator[Control]:
    """Yield every family once; seeds rotate the layouts, so that as many seeds as layouts cover every combination."""
    for number, family in enumerate(families):
        topology, zero_stage = LAYOUTS[(number + seed) % len(LAYOUTS)]
        yield Control(family, topology, zero_stage)


def zero_stage_at(dtype: str, zero_stage: int) -> int:
    """Return the ZeRO stage to run a dtype with: at least 1 for bfloat16.

    Without ZeRO, DeepSpeed 0.19.8 clips bfloat16 gradients by the norm of TP rank 0's shards alone.
    """
    return max(1, zero_stage) if dtype == "bfloat16" else zero_stage
