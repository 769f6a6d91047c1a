"""Saves a model that was built in memory and loads it sharded, which is the one public way to transformers' TP."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from tpcheck.errors import UsageError


def loaded(model: nn.Module, how: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Return the model as `from_pretrained` shards it, told `how` by its arguments. Collective over the world.

    Raises:
        UsageError: The model is none of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError("build", type(model).__name__, "a transformers.PreTrainedModel: it is loaded by transformers")
    with _shared_folder() as folder:
        model.save_pretrained(folder)  # it is the first rank alone that writes
        if dist.is_initialized():
            dist.barrier()
        sharded: PreTrainedModel = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=dtype, **how
        )
    _take_over_settings(sharded, model)
    return sharded


@contextmanager
def _shared_folder() -> Iterator[str]:
    """Make a folder that every rank on this machine reads; it is removed when the last one is done."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    names = [tempfile.mkdtemp(prefix="tpcheck-loaded-") if is_first else ""]
    try:
        if dist.is_initialized():
            dist.broadcast_object_list(names)
        yield names[0]
        if dist.is_initialized():
            dist.barrier()
    finally:
        if is_first:
            shutil.rmtree(names[0], ignore_errors=True)


def _take_over_settings(sharded: nn.Module, model: nn.Module) -> None:
    """Set what files do not carry: training mode, frozen parameters, and dropout that was switched off."""
    sharded.train(model.training)
    modules = dict(model.named_modules())
    for name, module in sharded.named_modules():
        for setting, value in vars(modules[name]).items() if name in modules else ():
            if isinstance(value, float) and not value and getattr(module, setting, None):
                setattr(module, setting, value)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in sharded.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
