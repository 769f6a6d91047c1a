"""The tensors inside a module's arguments or outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (path, tensor) for every tensor in nested mappings, sequences and dataclasses; other objects hold none."""
    if isinstance(value, torch.Tensor):
        yield path or "0", value
    else:
        for name, child in _children(value):
            yield from named_tensors(child, f"{path}.{name}" if path else name)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(name), child) for name, child in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), child) for index, child in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return `value` with `function` applied to its tensors, nested in tuples, lists, dicts and model outputs.

    Anything else is returned as it is, and so is a container in which nothing changed.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, child) for child in value)
    if isinstance(value, dict):  # a transformers ModelOutput is one, whose attributes follow its items
        mapped = {name: map_tensors(function, child) for name, child in value.items()}
        changed = {name: child for name, child in mapped.items() if child is not value[name]}
        result = copy(value) if changed else value
        for name, child in changed.items():
            result[name] = child
        return result
    return value
