"""`python -I -m tpcheck.checkpoints.rewrite_pickle FROM TO`: unpickle a file and save it without classes.

Unpickling runs code of the file; a separate process keeps that away from the memory of the caller.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn

MAX_DEPTH = 100


def rewrite(source: str, target: str) -> None:
    """Save the contents of `source` as tensors, containers, numbers and strings; tensors that share memory still do."""
    torch.save(without_classes(torch.load(source, map_location="cpu", weights_only=False)), target)


def without_classes(value: Any, depth: int = 0) -> Any:
    """Return the value without classes: a module as its state dict, another object as the dict of its attributes."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value)
    if value is None or type(value) in (bool, int, float, complex, str, bytes, torch.dtype):
        return value
    if isinstance(value, Enum):
        return without_classes(value.value, depth + 1)
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping):
        return {_plain_key(key): without_classes(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = list if isinstance(value, list) else tuple
        return kind(without_classes(entry, depth + 1) for entry in value)
    return (
        without_classes(vars(value), depth + 1)
        if hasattr(value, "__dict__") and not isinstance(value, type)
        else repr(value)
    )


def _plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor:
        tensor = tensor.as_subclass(torch.Tensor)
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return tensor
    return tensor.resolve_conj().resolve_neg()


def _plain_key(key: Any) -> Any:
    return key if isinstance(key, (str, int, float, bool, type(None))) else repr(key)


if __name__ == "__main__":
    rewrite(*sys.argv[1:])
