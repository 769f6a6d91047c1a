"""Fields of a file's structure, which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

LARGEST = 1 << 62


def mapping(value: Any) -> Mapping[Any, Any]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """Return the value if it is a list or tuple, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def is_sizes(value: Any) -> bool:
    """Return whether the value is a shape, or another sequence of sizes that torch can count the elements of."""
    if not isinstance(value, (list, tuple, torch.Size)) or not all(map(is_size, value)):
        return False
    return len(value) <= 64
