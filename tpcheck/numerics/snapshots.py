"""Copies of a model's parameters and buffers, and how to restore them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tpcheck.backends.local_part import local_part

State = Mapping[str, torch.Tensor]


def copy_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the parameters; of this rank's part where one is a DTensor."""
    return {name: local_part(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def copy_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the buffers, also of those that a checkpoint leaves out."""
    return {name: local_part(buffer.detach()).clone() for name, buffer in model.named_buffers()}


def restore_parameters(model: nn.Module, saved: State) -> None:
    """Set the parameters of an unsharded model back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])


def restore_buffers(model: nn.Module, saved: State) -> None:
    """Set the buffers back, also those that the model has replaced by others since."""
    for name, buffer in saved.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer.clone()


@contextmanager
def state_restored(model: nn.Module) -> Iterator[None]:
    """Run without gradients; restore buffers, also those that are replaced meanwhile, and random generators."""
    before = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng():
        yield
        for name, (buffer, value) in before.items():
            buffer.copy_(value)
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = buffer
