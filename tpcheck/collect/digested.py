"""A batch with its digests. What is the same from batch to batch, all but the bits of tensors, is made once."""

from __future__ import annotations

import struct
from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import xxhash

from tpcheck.collect.batch import Entry, entries
from tpcheck.collect.digest import start_digests
from tpcheck.records.batch import Leaf

_DEEPEST = 8  # levels that are remembered; deeper batches are looked at anew each time


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a batch is but for the bits of its tensors.

    Attributes:
        entries: Every leaf, tensors left out.
        places: Of the entries that have a tensor.
        order: Of these tensors, by path.
        head: What the token begins with: all that is known of every leaf, by path.
    """

    entries: tuple[Entry, ...]
    places: tuple[int, ...]
    order: tuple[int, ...]
    head: bytes

    @classmethod
    def of(cls, found: Sequence[Entry]) -> _Layout:
        places = [place for place, entry in enumerate(found) if entry.tensor is not None]
        by_path = sorted(found, key=lambda entry: entry.path)
        return cls(
            tuple(replace(entry, tensor=None) for entry in found),
            tuple(places),
            tuple(sorted(range(len(places)), key=lambda number: found[places[number]].path)),
            "".join(map(_told, by_path)).encode(),
        )

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> list[Entry]:
        found = list(self.entries)
        for place, tensor in zip(self.places, tensors, strict=True):
            told = found[place]
            found[place] = Entry(told.path, told.kind, told.dtype, told.shape, told.device, tensor)
        return found


class Remembered:
    """The layout of the batch before."""

    __slots__ = ("key", "layout")

    def __init__(self) -> None:
        self.key: list[Any] | None = None
        self.layout: _Layout | None = None


class Digested:
    """The leaves of a batch as they stood when this was made, their digests under way; see `start_digests`.

    Args:
        batch: Of anything.
        remembered: Of earlier batches of this loader.
    """

    def __init__(self, batch: Any, remembered: Remembered | None = None) -> None:
        remembered = remembered or Remembered()
        key: list[Any] = []
        tensors: list[torch.Tensor] = []
        if not _laid_out(batch, key, tensors, 0):
            found = entries(batch)
            self._layout = _Layout.of(found)
            tensors = [entry.tensor for entry in found if entry.tensor is not None]
        elif remembered.layout is not None and key == remembered.key:
            self._layout = remembered.layout
        else:
            self._layout = _Layout.of(entries(batch))
            remembered.key, remembered.layout = key, self._layout
        self._tensors = tensors
        self._finish = start_digests(tensors)

    @cached_property
    def token(self) -> bytes:
        """16 bytes that tell batches apart; the order of keys and the index of a device make no difference."""
        digests = self._finish()
        return xxhash.xxh3_128_digest(self._layout.head + b"".join([digests[number] for number in self._layout.order]))

    @cached_property
    def entries(self) -> list[Entry]:
        """Every leaf, in the order of the structure."""
        return self._layout.with_tensors(self._tensors)

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The same with digests."""
        of_tensors = dict(zip(self._layout.places, self._finish(), strict=True))
        return tuple(
            Leaf(
                entry.path,
                entry.kind,
                entry.dtype,
                entry.shape,
                entry.device,
                of_tensors[place].hex() if place in of_tensors else xxhash.xxh3_128_hexdigest(entry.text),
            )
            for place, entry in enumerate(self._layout.entries)
        )


def leaves_of(batch: Any) -> tuple[Leaf, ...]:
    """Return every leaf of a batch, in the order of its structure.

    Example:
        >>> [(leaf.path, leaf.dtype, leaf.shape) for leaf in leaves_of({"ids": torch.zeros(2, 3), "text": ["a"]})]
        [('', 'dict', (2,)), ('ids', 'torch.float32', (2, 3)), ('text', 'list', (1,)), ('text.0', 'str', ())]
    """
    return Digested(batch).leaves


def _told(entry: Entry) -> str:
    """Return what is told of a leaf, with the digest of one that has no tensor."""
    digest = "" if entry.tensor is not None else xxhash.xxh3_128_hexdigest(entry.text)
    device = entry.device.partition(":")[0]
    return f"{entry.path}\0{entry.kind}\0{entry.dtype}\0{entry.shape}\0{device}\0{digest}\0"


def _laid_out(value: Any, key: list[Any], tensors: list[torch.Tensor], depth: int) -> bool:
    """Append all that `entries` tells of it but the bits of tensors, and the tensors; False for rarer kinds of batches.

    Keys are compared by ==, so they hold nothing that equals another value: no float, no number without its type.
    """
    kind = type(value)
    if kind is torch.Tensor:
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            return False
        key += (value.dtype, value.shape, value.device)
        tensors.append(value)
        return True
    key.append(kind)
    if kind is dict or isinstance(value, UserDict):  # UserDict: transformers' BatchEncoding, BatchFeature
        key.append(len(value))
        for name, child in value.items():
            key.append(name)
            if type(name) is not str or depth == _DEEPEST or not _laid_out(child, key, tensors, depth + 1):
                return False
        return True
    if kind is list or kind is tuple:
        key.append(len(value))
        return depth < _DEEPEST and all(_laid_out(child, key, tensors, depth + 1) for child in value)
    key.append(struct.pack("d", value) if kind is float else value)
    return kind in (str, int, bool, float, bytes, type(None))
