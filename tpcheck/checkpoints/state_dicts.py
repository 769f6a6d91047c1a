"""The state dict within what a torch file holds, and what of it is no tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.checkpoints.files import shortened
from tpcheck.checkpoints.inert import Inert
from tpcheck.checkpoints.stored import StoredTensor
from tpcheck.errors import CheckpointError

KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Where trainers put the model's state dict, beside that of the optimizer."""


@dataclass(frozen=True, slots=True)
class StateDict:
    """Tensors by name.

    Attributes:
        key: Where in the file it was found; None if it is all of it.
        tensors: What can be read.
        unread: Entries that cannot, with the reason.
    """

    key: str | None
    tensors: Mapping[str, StoredTensor]
    unread: Mapping[str, str]


def state_dict(structure: Any, where: object) -> StateDict:
    """Return the state dict that a file holds, whole or under one of the usual keys.

    Raises:
        CheckpointError: It holds none, or several.
    """
    if not isinstance(structure, Mapping):
        raise CheckpointError(f"{where} holds no state dict, but {_what(structure)}.")
    keys = [key for key in KEYS if _holds_tensors(structure.get(key))]
    if len(keys) > 1:
        raise CheckpointError(f"{where} holds several state dicts, under {', '.join(map(repr, keys))}.")
    key = keys[0] if keys else None
    entries = structure if key is None else structure[key]
    if not _holds_tensors(entries):
        raise CheckpointError(f"{where} holds no state dict: {_outline(structure)}.")
    tensors = {_name(name, where): value for name, value in entries.items() if isinstance(value, StoredTensor)}
    unread = {_name(name, where): f"is {_what(value)}" for name, value in entries.items() if name not in tensors}
    return StateDict(key, tensors, unread)


def ties(tensors: Mapping[str, StoredTensor]) -> tuple[frozenset[str], ...]:
    """Return the groups of names that are one view of one storage."""
    names: dict[StoredTensor, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.nbytes:
            names[tensor].append(name)
    return tuple(frozenset(tied) for tied in names.values() if len(tied) > 1)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, StoredTensor) for entry in value.values())


def _name(name: Any, where: object) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"{where} holds a state dict with a name that is no text, but {shortened(name)}.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} holds a tensor with a name that is no text: {shortened(name)}.") from None
    return name


def _what(value: Any) -> str:
    if isinstance(value, StoredTensor):
        return "a tensor"
    if isinstance(value, Inert):
        return f"made by {value.name}" if "." in value.name else value.name
    return f"a {type(value).__name__}, not a tensor"


def _outline(structure: Mapping[Any, Any]) -> str:
    keys = ", ".join(shortened(key, 40) for key in list(structure)[:5])
    return f"no tensors under its keys {keys}" if keys else "it is empty"
