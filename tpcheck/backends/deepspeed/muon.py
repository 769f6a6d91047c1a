"""DeepSpeed's Muon on the parameters of the reference: whole matrices, by the code that steps each rank's shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from tpcheck.core.errors import UsageError

_NOT_MATRICES = ("embed", "lm_head")  # by parts of names: `set_optimizer_flags` in deepspeed/__init__.py of 0.19.8


def make_muon(
    params: Mapping[str, Any], names: Sequence[str], parameters: Sequence[torch.Tensor]
) -> torch.optim.Optimizer:
    """Return Muon for matrices but the embedding and the head, and AdamW for the rest, as the engine makes it.

    Raises:
        UsageError: This DeepSpeed has no such optimizer.
    """
    if not hasattr(DeepSpeedEngine, "_muon_param_groups"):
        raise UsageError("config.optimizer.type", "Muon", "AdamW, or DeepSpeed 0.19.8 or later")
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # which compiles its kernels

    settings = {key: value for key, value in params.items() if key != "adam_w_mode"}
    for name, parameter in zip(names, parameters, strict=True):
        is_matrix = parameter.dim() >= 2 and not any(part in name.lower() for part in _NOT_MATRICES)
        parameter.use_muon = is_matrix  # type: ignore[attr-defined]
        parameter.requires_grad_()
    decays = params.get("adam_w_mode", True)
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        DeepSpeedEngine._muon_param_groups(list(parameters), settings),
        adam_optimizer=torch.optim.AdamW if decays else torch.optim.Adam,
        adam_optimizer_kwargs={"foreach": False},
        adam_w_mode=decays,
    )
    return optimizer
