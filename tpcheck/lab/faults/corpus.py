"""All faults, in the order of their tables, and the clean controls.

A new fault is a row of `FAULTS` in one of these modules; its fields are in `fault.py`, `checkpoint.py`, `data.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpcheck.core.topology import Topology
from tpcheck.lab.faults import (
    adapters,
    backward,
    checkpoint,
    clipping,
    data,
    hand_written,
    heads,
    initialisation,
    layout,
    linear,
    loss_scale,
    losses,
    optimizer,
    precision,
    replicas,
    resume,
    trainer,
    training,
    vocabulary,
)
from tpcheck.lab.faults.checkpoint import CheckpointFault
from tpcheck.lab.faults.data import DataFault
from tpcheck.lab.faults.fault import TP2, TP2_DP2, TP4, ModelFault
from tpcheck.lab.faults.hand_written import HandWrittenControl, HandWrittenFault

MODEL_FAULTS: tuple[ModelFault, ...] = (
    *linear.FAULTS,
    *vocabulary.FAULTS,
    *layout.FAULTS,
    *heads.FAULTS,
    *backward.FAULTS,
    *replicas.FAULTS,
    *optimizer.FAULTS,
    *training.FAULTS,
    *trainer.FAULTS,
    *precision.FAULTS,
    *loss_scale.FAULTS,
    *resume.FAULTS,
    *adapters.FAULTS,
)
CHECKPOINT_FAULTS: tuple[CheckpointFault, ...] = checkpoint.FAULTS
DATA_FAULTS: tuple[DataFault, ...] = data.FAULTS
HAND_WRITTEN_FAULTS: tuple[HandWrittenFault, ...] = (
    *hand_written.FAULTS,
    *losses.FAULTS,
    *clipping.FAULTS,
    *initialisation.FAULTS,
)
HAND_WRITTEN_CONTROLS: tuple[HandWrittenControl, ...] = (
    *hand_written.CONTROLS,
    *losses.CONTROLS,
    *clipping.CONTROLS,
    *initialisation.CONTROLS,
)

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
    options: Mapping[str, Any] = field(default_factory=dict)


_TRAINED = {"optimizer": "adamw", "accumulate": 2, "loss": "token_mean"}
_CONFIGURED = {
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}},
    "gradient_accumulation_steps": 2,
}
_OVERFLOWING = {"initial_scale_power": 17, "hysteresis": 1}
TRAINED_CONTROLS = (
    *(Control("llama", TP2_DP2, zero_stage, _TRAINED) for zero_stage in (0, 1, 2, 3)),
    *(Control("llama", TP2_DP2, zero_stage, {"config": _CONFIGURED, "steps": 3}) for zero_stage in (0, 2)),
    Control("llama", Topology(dp=2), 0, {"config": {"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}}),
    *(Control("llama", TP2, zero_stage, {"dtype": "float16"}) for zero_stage in (1, 2, 3)),
    Control("qwen3", TP2_DP2, 2, {**_TRAINED, "dtype": "float16", "config": {"fp16": {"loss_scale": 256.0}}}),
    Control("llama", TP2, 1, {"dtype": "float16", "steps": 3, "config": {"fp16": _OVERFLOWING}}),
    Control("qwen3", TP2, 0, {"optimizer": "adamw", "accumulate": 3, "batch": "3x7,padded"}),
    Control("gemma3_text", TP2_DP2, 0, {"optimizer": "rmsprop", "loss": "token_mean"}),
    Control("llama", TP2, 0, {"optimizer": "adamw", "checks": ("resume_matches_uninterrupted",)}),
    Control(
        "llama",
        TP2,
        0,
        {"optimizer": "adamw", "checks": ("resume_matches_uninterrupted",), "loop": "trainer", "accumulate": 2},
    ),
    Control("llama", TP2, 0, {"lora": adapters.COLUMN_PARALLEL, "backend": "transformers"}),
    Control("llama", TP2, 0, {"lora": 4, "backend": "dtensor"}),
    Control("qwen3", TP2, 0, {"lora": "4,attention,rslora", "backend": "dtensor"}),
    Control("llama", TP2_DP2, 1, {**_TRAINED, "loop": "trainer"}),
    Control("qwen3", TP2_DP2, 0, {"accumulate": 2, "loop": "trainer"}),
    Control("llama", TP2_DP2, 0, {**_TRAINED, "loop": "trainer", "backend": "transformers"}),
)
"""Right steps of the usual kinds: Adam, micro-batches, losses over labels, DeepSpeed's own optimizer and schedule, and
transformers' Trainer."""
_EXPERTS = {"backend": "transformers", "steps": 1}
IMPLEMENTED_CONTROLS = (
    Control("llama", TP2, 0, {"attention": "sdpa"}),
    Control("qwen3", TP2_DP2, 1, {"attention": "sdpa", "checkpointing": True}),
    Control("llama", TP2, 0, {"checkpointing": True, "reentrant": True}),
    *(Control("qwen3_moe", TP2, 0, {**_EXPERTS, "experts": experts}) for experts in ("eager", "batched_mm")),
)
"""Other implementations of the same mathematics."""

INITIALISED_CONTROLS = tuple(
    Control("llama", TP2, 0, {"backend": backend, "checks": ("initialisation_matches_reference",)})
    for backend in ("deepspeed", "transformers", "dtensor")
)
"""Models that are made from scratch on the ranks."""


def quick_controls() -> Iterator[Control]:
    """Yield every family once, and every layout once."""
    for family in FAMILIES:
        yield Control(family)
    for number, (topology, zero_stage) in enumerate(LAYOUTS[1:]):
        yield Control(FAMILIES[number % len(FAMILIES)], topology, zero_stage)
    yield from TRAINED_CONTROLS
    yield from IMPLEMENTED_CONTROLS
    yield from INITIALISED_CONTROLS


def rotated_controls(families: Sequence[str], seed: int) -> Iterator[Control]:
    """Yield every family once; seeds rotate the layouts, so that as many seeds as layouts cover every combination."""
    for number, family in enumerate(families):
        topology, zero_stage = LAYOUTS[(number + seed) % len(LAYOUTS)]
        yield Control(family, topology, zero_stage)


def zero_stage_at(dtype: str, zero_stage: int, backend: str) -> int:
    """Return the ZeRO stage to run a dtype with: under DeepSpeed at least 1 for bfloat16.

    Without ZeRO, DeepSpeed 0.19.8 clips bfloat16 gradients by the norm of TP rank 0's shards alone.
    """
    return max(1, zero_stage) if (dtype, backend) == ("bfloat16", "deepspeed") else zero_stage
