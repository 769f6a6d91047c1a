"""What each way of saving a model writes under a DeepSpeed configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Saved:
    """One way to save.

    Attributes:
        way: The call.
        writes: What it writes.
        is_model: Whether that is the whole model.
    """

    way: str
    writes: str
    is_model: bool


def what_is_saved(config: Config) -> Iterator[Saved]:
    """Yield what each public way of DeepSpeed 0.17 to 0.19 writes, as its engine.py has it."""
    tp, stage = num_tp(config), zero_stage(config)
    yield _save_16bit_model(config, tp, stage)
    if tp > 1 or stage == 3:
        buffers = "" if stage == 3 else ", without persistent buffers"
        yield Saved("engine._consolidated_16bit_state_dict()", f"on rank 0, every parameter whole{buffers}", stage == 3)
    files = "mp_rank_00" if tp == 1 else f"mp_rank_00 to mp_rank_{tp - 1:02}, one TP shard each"
    masters = "; fp32 weights in the optimizer's files, one for each DP rank" if stage else ""
    yield Saved("engine.save_checkpoint", f"a training checkpoint: {files}{masters}", True)
    if stage:
        yield Saved("ds_to_universal on that", "fp32 weights, whole: loads with any number of TP ranks", True)


def _save_16bit_model(config: Config, tp: int, stage: int) -> Saved:
    way = "engine.save_16bit_model"
    if stage == 3:
        gathers = section(config, "zero_optimization").get("stage3_gather_16bit_weights_on_model_save", False)
        if gathers is not True:
            return Saved(way, "nothing: stage3_gather_16bit_weights_on_model_save is not true", False)
        return Saved(way, "the whole model, in its 16-bit dtype where it has one", True)
    if tp > 1:
        return Saved(way, f"TP rank 0's shards, as if they were the model: about 1/{tp} of it", False)
    return Saved(way, "the whole model, as large as without TP: tensor parallelism is off", True)


def num_tp(config: Config) -> int:
    """Return how many TP ranks the configuration asks for; 1 where it says nothing."""
    size = section(config, "tensor_parallel").get("autotp_size")
    return size if isinstance(size, int) and size > 1 else 1


def zero_stage(config: Config) -> int:
    """Return the ZeRO stage; 0 where the configuration says nothing."""
    stage = section(config, "zero_optimization").get("stage", 0)
    return stage if isinstance(stage, int) else 0


def section(config: Config, name: str) -> Mapping[str, Any]:
    """Return a section of the configuration; empty where it is none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}
