"""States of a small DeepSpeed training checkpoint at tp 2, as DeepSpeed saves them."""

from __future__ import annotations

from typing import Any

import torch


def piece(rank: int, **changes: Any) -> dict[str, Any]:
    return {"shape": [2, 4], "source": [8 * rank, [4, 1]], "dest": [0, [4, 1]], "locations": [rank], **changes}


def affine(**changes: Any) -> dict[str, Any]:
    ranks = {rank: {"shard_shape": [2, 4], "pieces": [piece(rank)]} for rank in (0, 1)}
    return {"logical_shape": [4, 4], "ranks": ranks, **changes}


def model_states(rank: int, **changes: Any) -> dict[str, Any]:
    params = {r"^cut\.weight$": affine()}
    info = {"tp_replicated_parameter_patterns": [r"^norm$"], "affine_map": {"version": 1, "params": params}}
    return {
        "module": {"cut.weight": torch.arange(8.0).reshape(2, 4) + 8 * rank, "norm": torch.ones(4)},
        "buffer_names": [],
        "param_shapes": [{"cut.weight": torch.Size([2, 4]), "norm": torch.Size([4])}],
        "shared_params": {},
        "mp_world_size": 2,
        "global_steps": 1,
        "universal_checkpoint_info": info,
        **changes,
    }


def optimizer_states(rank: int, **changes: Any) -> dict[str, Any]:
    flat = torch.cat([torch.arange(8.0) + 8 * rank, torch.ones(4)])
    state = {"zero_stage": 1, "partition_count": [1], "single_partition_of_fp32_groups": [flat], **changes}
    return {"optimizer_state_dict": state}
