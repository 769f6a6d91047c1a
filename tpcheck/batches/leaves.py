"""The leaves of a batch, whatever it is made of, and their digests."""

from __future__ import annotations

import struct
import sys
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import cached_property
from pathlib import PurePath
from typing import Any
from uuid import UUID

import torch
import xxhash

from tpcheck.batches.records import Leaf, LeafKind
from tpcheck.core.digests import start_digests

_DEEPEST_NESTING = 32  # levels of nesting; a batch that holds itself ends here
# Their `repr` tells them apart, and is the same in every process.
_TOLD_BY_REPR = (
    *(type(None), bool, int, str, bytes, bytearray, complex, range, slice, Enum, Decimal, Fraction, date, time),
    *(timedelta, UUID, PurePath, torch.dtype, torch.device, type),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One leaf as it stands in the batch.

    Attributes:
        path, kind: As in `Leaf`.
        dtype, shape, device: As in `Leaf`.
        tensor: The bits of a tensor or an array as a strided tensor; arrays share their memory with it.
        text: What tells a plain value from others.
    """

    path: str
    kind: LeafKind
    dtype: str
    shape: tuple[int, ...] = ()
    device: str = ""
    tensor: torch.Tensor | None = None
    text: bytes = b""


def entries(batch: Any) -> list[Entry]:
    """Return every leaf of mappings, sequences, dataclasses and plain objects, and of each container its type and size.

    A sparse or nested tensor is taken apart into its strided ones.
    """
    return list(_entries(batch, "", 0))


def as_tensor(entry: Entry) -> torch.Tensor | None:
    """Return a tensor, or an array as one of its own dtype and shape; None for anything else, as for dates."""
    if entry.kind != "array" or entry.tensor is None:
        return entry.tensor
    try:
        return torch.from_numpy(entry.tensor.numpy().view(entry.dtype).reshape(entry.shape))
    except TypeError:  # text, structured and other dtypes that torch does not have
        return None


def _entries(value: Any, path: str, depth: int) -> Iterator[Entry]:
    if (
        type(value) is dict and depth < _DEEPEST_NESTING
    ):  # most of what batches are made of: spares it all other questions
        yield Entry(path, "value", "dict", (len(value),))
        for key, child in value.items():
            yield from _entries(child, _join(path, key if isinstance(key, str) else f"[{key!r}]"), depth + 1)
    elif isinstance(value, torch.Tensor):
        yield from _of_tensor(value, path)
    elif _is_array(value):
        yield from _of_array(value, path, depth)
    elif isinstance(value, float):
        yield Entry(path, "value", type(value).__name__, text=struct.pack("d", value))  # NaN bit for bit
    elif isinstance(value, _TOLD_BY_REPR):
        yield Entry(path, "value", type(value).__name__, text=repr(value).encode(errors="surrogatepass"))
    elif isinstance(value, Set):
        members = sorted(repr(member) for member in value)  # in an order of their own in every process
        yield Entry(path, "value", type(value).__name__, (len(members),), text="\0".join(members).encode())
    else:
        yield from _of_container(value, path, depth)


def _of_container(value: Any, path: str, depth: int) -> Iterator[Entry]:
    children = _children(value) if depth < _DEEPEST_NESTING else None
    if children is None:
        contents = value.tobytes() if callable(getattr(value, "tobytes", None)) else b""  # PIL images, memory views
        yield Entry(path, "opaque", type(value).__name__, text=contents)
        return
    yield Entry(path, "value", type(value).__name__, (len(children),))
    for name, child in children:
        yield from _entries(child, _join(path, name), depth + 1)


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """Return the named parts of a container, or None where it cannot be looked into."""
    if isinstance(value, Mapping):
        return [(key if isinstance(key, str) else f"[{key!r}]", child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if hasattr(value, "__dict__") and not callable(value) and not hasattr(value, "tobytes"):
        return list(vars(value).items())
    return None


def _of_tensor(tensor: torch.Tensor, path: str) -> Iterator[Entry]:
    local = (
        tensor if type(tensor) is torch.Tensor or not hasattr(tensor, "to_local") else tensor.to_local()
    )  # a DTensor
    parts = _strided_parts(local)
    if parts is None:
        yield Entry(path, "tensor", str(local.dtype), tuple(local.shape), str(local.device), tensor=local)
        return
    kind = "nested" if local.is_nested else str(local.layout)
    shape = () if local.is_nested else tuple(local.shape)
    yield Entry(path, "tensor", f"{local.dtype} {kind}", shape, str(local.device))
    for name, part in parts.items():
        yield from _of_tensor(part, _join(path, name))


def _strided_parts(tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Return the tensors that a sparse, nested or quantized one is made of, or None for a strided one."""
    if tensor.is_nested:
        if tensor.layout == torch.jagged:
            return {"values": tensor.values(), "offsets": tensor.offsets()}  # type: ignore[attr-defined]
        return {str(index): part for index, part in enumerate(tensor.unbind())}
    if tensor.layout == torch.strided and not tensor.is_quantized:
        return None
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        return {"indices": whole.indices(), "values": whole.values()}
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return {"crow_indices": tensor.crow_indices(), "col_indices": tensor.col_indices(), "values": tensor.values()}
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return {"ccol_indices": tensor.ccol_indices(), "row_indices": tensor.row_indices(), "values": tensor.values()}
    if tensor.is_quantized:
        return {"int_repr": tensor.int_repr()}
    return None


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _of_array(array: Any, path: str, depth: int) -> Iterator[Entry]:
    numpy = sys.modules["numpy"]
    if array.dtype.hasobject or not array.dtype.itemsize:
        yield Entry(path, "array", str(array.dtype), tuple(array.shape))
        yield from _entries(array.tolist(), _join(path, "objects"), depth + 1)
        return
    if numpy.ma.isMaskedArray(array):
        yield from _of_array(numpy.ma.getmaskarray(array), _join(path, "mask"), depth)
    flat = numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)
    if not flat.flags.writeable:  # torch warns of such memory
        flat = flat.copy()
    yield Entry(path, "array", str(array.dtype), tuple(array.shape), tensor=torch.from_numpy(flat))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_DEEPEST_REMEMBERED = 8  # levels that are remembered; deeper batches are looked at anew each time


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
            if type(name) is not str or depth == _DEEPEST_REMEMBERED or not _laid_out(child, key, tensors, depth + 1):
                return False
        return True
    if kind is list or kind is tuple:
        key.append(len(value))
        return depth < _DEEPEST_REMEMBERED and all(_laid_out(child, key, tensors, depth + 1) for child in value)
    key.append(struct.pack("d", value) if kind is float else value)
    return kind in (str, int, bool, float, bytes, type(None))
