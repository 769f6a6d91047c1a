"""Read checkpoints as tpcheck does, and compare what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, ReadOptions
from tpcheck.checkpoints.comparison import open_checkpoint

State = dict[str, torch.Tensor]


def open_source(source: Any, *, allow_pickle: bool = False) -> Checkpoint:
    """Open with the installed format of the highest precedence that recognises the source."""
    return open_checkpoint("source", source, ReadOptions(allow_pickle=allow_pickle))


def read_all(source: Any, *, allow_pickle: bool = False) -> State:
    """Read every tensor, in two parts of its rows where it has several."""
    checkpoint = open_source(source, allow_pickle=allow_pickle)
    try:
        return {name: read_tensor(checkpoint, name) for name in checkpoint.names()}
    finally:
        checkpoint.close()


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    shape = checkpoint.shape(name)
    if not shape or shape[0] < 2:
        return checkpoint.read(name, range(shape[0] if shape else 1))
    middle = shape[0] // 3 + 1
    parts = checkpoint.read(name, range(middle)), checkpoint.read(name, range(middle, shape[0]))
    if parts[0].dtype.itemsize == 1:  # torch cannot concatenate all dtypes of one byte
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(parts)


def same_tensors(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Return whether names, shapes, dtypes and bits are equal."""
    return {*actual} == {*expected} and all(same_bits(actual[name], expected[name]) for name in expected)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether shapes, dtypes and bits are equal."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return False
    return torch.equal(bits_of(actual), bits_of(expected))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
