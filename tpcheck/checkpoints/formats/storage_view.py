"""A tensor of a torch file as a strided view of a storage: where its bytes lie, without reading them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Extent
from tpcheck.checkpoints.formats.files import Files, shortened
from tpcheck.core.errors import CheckpointError

MAX_SPAN = 8 << 20
"""Bytes read at once to pick strided elements out of them."""

MAX_EXPANSION = 1 << 30
"""Bytes of a tensor that repeats its storage by a stride of 0, as causal masks do; hostile files ask for petabytes."""


@dataclass(eq=False, slots=True)
class Storage:
    """A storage of a torch file; tensors that share it are views of the same memory.

    Attributes:
        path: The file.
        dtype: The dtype of the storage; a tensor may view its bytes as another one.
        nbytes: Its length.
        offset: Position of its first byte; a legacy file has it behind all tensors.
    """

    path: Path
    dtype: torch.dtype
    nbytes: int
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class StorageView:
    """A strided view of a storage; two views are equal, and tied, if they are the same view of the same storage."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def extent(self) -> Extent | None:
        """Return where the elements lie, or None where they do not lie in row-major order without gaps."""
        if not _is_contiguous(self.shape, self.stride):
            return None
        return Extent(self.storage.path, self._position(self.start), self.nbytes)

    def read(self, files: Files, rows: range) -> torch.Tensor:
        """Return consecutive indices of dim 0, contiguous; a scalar for any rows."""
        if not self.shape:
            return self._read(files, self.start, (), ())
        start = self.start + rows.start * self.stride[0] if len(rows) else self.start
        return self._read(files, start, (len(rows), *self.shape[1:]), self.stride)

    def _read(self, files: Files, start: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        span = _span(shape, stride)
        dense = span <= 2 * prod(shape)
        if dense or span * self.dtype.itemsize <= MAX_SPAN:
            elements = files.open(self.storage.path).read_tensor(self._position(start), (span,), self.dtype)
            return elements.as_strided(shape, stride).contiguous()
        widest = max((dim for dim in range(len(shape)) if shape[dim] > 1), key=lambda dim: stride[dim])
        half = shape[widest] // 2
        parts = [
            self._read(files, start + begin * stride[widest], _with_size(shape, widest, end - begin), stride)
            for begin, end in ((0, half), (half, shape[widest]))
        ]
        return torch.cat(parts, dim=widest)

    def _position(self, element: int) -> int:
        if self.storage.offset is None:
            raise CheckpointError(f"{self.storage.path} holds a tensor without its storage.")
        return self.storage.offset + element * self.dtype.itemsize


def storage_view(storage: Any, start: Any, shape: Any, stride: Any, *, dtype: torch.dtype | None = None) -> StorageView:
    """Return a view of a storage from values that a file states.

    Raises:
        CheckpointError: The values are not a view, or it reaches beyond its storage.
    """
    if not isinstance(storage, Storage):
        raise CheckpointError("a tensor has no storage")
    numbers = (start, *_sizes(shape), *_sizes(stride))
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or len(shape) != len(stride):
        raise CheckpointError(f"a tensor has the offset {shortened(start)} and sizes or strides that are not valid")
    if prod(size for size in shape if size) >= 1 << 60:
        raise CheckpointError("a tensor has a shape that exceeds any memory")
    dtype = storage.dtype if dtype is None else dtype
    span = _span(shape, stride)
    if span and (start + span) * dtype.itemsize > storage.nbytes:
        raise CheckpointError(f"a tensor of shape {shortened(str(tuple(shape)))} reaches beyond its storage")
    nbytes = prod(shape) * dtype.itemsize
    if nbytes > max(storage.nbytes, MAX_EXPANSION):
        raise CheckpointError(f"a tensor of {nbytes} bytes repeats {storage.nbytes} bytes of storage")
    return StorageView(storage, start, tuple(shape), tuple(stride), dtype)


def _sizes(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 64:
        raise CheckpointError("a tensor has no sizes")
    return tuple(value)


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the number of elements from the first to the last of the view."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return 0 in shape
        expected *= size
    return True


def _with_size(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
