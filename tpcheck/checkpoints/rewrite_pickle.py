"""`python -I -m tpcheck.checkpoints.rewrite_pickle FROM TO`: unpickles a file, and saves it with nothing to run in it.

Runs what the file says. It is a process of its own, so that what it runs finds none of its caller's memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn

DEEPEST = 100


def rewrite(source: str, target: str) -> None:
    """Save what `source` holds as tensors, containers, numbers and strings; tensors that share memory still do."""
    torch.save(plain(torch.load(source, map_location="cpu", weights_only=False)), target)


def plain(value: Any, depth: int = 0) -> Any:
    """Return the value without classes: a module as its state dict, another object as the dict of its attributes."""
    if depth > DEEPEST:
        return None
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value)
    if value is None or type(value) in (bool, int, float, complex, str, bytes, torch.dtype):
        return value
    if isinstance(value, Enum):
        return plain(value.value, depth + 1)
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping):
        return {_plain_key(key): plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = list if isinstance(value, list) else tuple
        return kind(plain(entry, depth + 1) for entry in value)
    return plain(vars(value), depth + 1) if hasattr(value, "__dict__") and not isinstance(value, type) else repr(value)


def _plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    plain_one = tensor.detach()
    if type(plain_one) is not torch.Tensor:
        plain_one = plain_one.as_subclass(torch.Tensor)
    if plain_one.is_quantized or plain_one.layout is not torch.strided:
        return plain_one
    return plain_one.resolve_conj().resolve_neg()


def _plain_key(key: Any) -> Any:
    return key if isinstance(key, (str, int, float, bool, type(None))) else repr(key)


if __name__ == "__main__":
    rewrite(*sys.argv[1:])
