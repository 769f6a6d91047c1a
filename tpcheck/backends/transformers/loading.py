"""Shards a model of transformers the one public way: save it, and load it again with tensor parallelism."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from tpcheck.core.errors import UsageError


def save_and_load(model: nn.Module, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    """Return the model as `from_pretrained(folder, **how)` shards it. Collective over the world.

    Raises:
        UsageError: The model is not a `PreTrainedModel`.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError("build", type(model).__name__, "a transformers.PreTrainedModel: transformers loads it")
    with _shared_folder() as folder:
        model.save_pretrained(folder)  # only the first rank writes
        if dist.is_initialized():
            dist.barrier()
        sharded: PreTrainedModel = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=dtype, **how
        )
    copy_unsaved_settings(model, sharded)
    return sharded


@contextmanager
def _shared_folder() -> Iterator[str]:
    """Make a folder that every rank on this machine reads, and remove it once all of them have left the context."""
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


def copy_unsaved_settings(model: nn.Module, sharded: nn.Module) -> None:
    """Copy what files do not carry: training mode, frozen parameters, and dropout that was switched off."""
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
