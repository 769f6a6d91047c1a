"""The public ways to save a model that DeepSpeed trains."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_WEIGHTS = "pytorch_model.bin"


def ways_to_save(engine: Any) -> Mapping[str, Callable[[Path], None]]:
    """Return each way by the name that users know it by; collective over the world."""
    gathers = engine.autotp_size() > 1 or engine.zero_optimization_partition_weights()
    return {
        "save_16bit_model": partial(_save_16bit_model, engine),
        **({"consolidated state dict": partial(_save_consolidated, engine)} if gathers else {}),
        "save_checkpoint": partial(_save_checkpoint, engine),
        **({"universal checkpoint": partial(_save_universal, engine)} if engine.zero_optimization() else {}),
    }


def _save_16bit_model(engine: Any, folder: Path) -> None:
    engine.save_16bit_model(str(folder), save_filename=_WEIGHTS)


def _save_consolidated(engine: Any, folder: Path) -> None:
    state = engine._consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        torch.save(dict(state), folder / _WEIGHTS)


def _save_checkpoint(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder))


def _save_universal(engine: Any, folder: Path) -> None:
    training, universal = folder / "training", folder / "universal"
    engine.save_checkpoint(str(training), tag="step")
    dist.barrier()
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        for file in (training / "step").glob("*_optim_states.pt"):
            _add_adam_state(file)
        ds_to_universal.main(_conversion(training / "step", universal))


def _conversion(training: Path, universal: Path) -> Namespace:
    """Return what the command line of ds_to_universal would be told."""
    return Namespace(
        input_folder=str(training),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )


def _add_adam_state(file: Path) -> None:
    """Add moments of zero to the optimizer states that this run has just written: the conversion knows Adam's alone."""
    saved = torch.load(file, map_location="cpu", weights_only=False)
    zero = saved["optimizer_state_dict"]
    masters = zero.get("fp32_flat_groups") or zero["single_partition_of_fp32_groups"]
    states = (zero.get("optimizer_state_dict") or zero["base_optimizer_state"])["state"]
    for number, master in enumerate(masters):
        state = states.setdefault(number, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            state.setdefault(moment, torch.zeros_like(master))
    torch.save(saved, file)
