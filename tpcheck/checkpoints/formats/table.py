"""A checkpoint as a table of named tensors that lie in files, whole or in rectangles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch

from tpcheck.backends.checkpoint_format import Extent
from tpcheck.checkpoints.formats.files import Files
from tpcheck.core.errors import CheckpointError


class TensorInFiles(Protocol):
    """One tensor, and how to get its elements."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def extent(self) -> Extent | None:
        """Return where it lies in one piece, else None."""

    def read(self, files: Files, rows: range) -> torch.Tensor:
        """Return consecutive indices of dim 0, contiguous; a scalar for any rows."""


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor that lies in one piece."""

    place: Extent
    shape: tuple[int, ...]
    dtype: torch.dtype

    def extent(self) -> Extent | None:
        return self.place

    def read(self, files: Files, rows: range) -> torch.Tensor:
        file = files.open(self.place.path)
        if not self.shape:
            elements = torch.empty((), dtype=self.dtype)
            file.read_into(self.place.offset, elements)
            return elements
        row_nbytes = prod(self.shape[1:]) * self.dtype.itemsize
        elements = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        file.read_into(self.place.offset + rows.start * row_nbytes, elements)
        return elements


@dataclass(frozen=True, slots=True)
class TableCheckpoint:
    """Implements `adapters.Checkpoint` over a table of tensors."""

    files: Files
    description: str
    tensors: Mapping[str, TensorInFiles]
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    torn: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """In the order in which they lie in the files, since disks read ahead."""
        return tuple(sorted(self.tensors, key=lambda name: _position(self.tensors[name])))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: range) -> torch.Tensor:
        return self.tensors[name].read(self.files, rows)

    def extent(self, name: str) -> Extent | None:
        return self.tensors[name].extent()

    def require_unchanged(self) -> None:
        self.files.require_unchanged()

    def close(self) -> None:
        self.files.close()


def _position(tensor: TensorInFiles) -> tuple[str, int]:
    extent = tensor.extent()
    return ("", 0) if extent is None else (str(extent.path), extent.offset)


@dataclass(frozen=True, slots=True)
class Box:
    """A piece, and the indices at which it starts in the whole."""

    offsets: tuple[int, ...]
    tensor: TensorInFiles

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.tensor.shape, strict=True))


@dataclass(frozen=True, slots=True)
class BoxedTensor:
    """Pieces that cover a tensor exactly."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]

    def extent(self) -> Extent | None:
        return self.boxes[0].tensor.extent() if len(self.boxes) == 1 else None

    def read(self, files: Files, rows: range) -> torch.Tensor:
        if len(self.boxes) == 1:
            return self.boxes[0].tensor.read(files, rows)
        whole = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for box in self.boxes:
            start, end = max(rows.start, box.offsets[0]), min(rows.stop, box.ends[0])
            if start < end:
                piece = box.tensor.read(files, range(start - box.offsets[0], end - box.offsets[0]))
                columns = (slice(begin, stop) for begin, stop in zip(box.offsets[1:], box.ends[1:], strict=True))
                place = (slice(start - rows.start, end - rows.start), *columns)
                whole[place] = piece
        return whole


def put_together(boxes: Sequence[Box]) -> BoxedTensor:
    """Return the tensor that the pieces are.

    It is as large as the pieces reach, which nothing else says: without its last piece it is a smaller tensor.

    Raises:
        CheckpointError: They overlap, leave a gap, or do not fit each other; says how, for a tensor to be named before.
    """
    first = boxes[0].tensor
    if any(len(box.tensor.shape) != len(first.shape) or box.tensor.dtype != first.dtype for box in boxes):
        raise CheckpointError("is held in pieces of different dtypes or numbers of dimensions")
    shape = tuple(max(ends) for ends in zip(*(box.ends for box in boxes), strict=True))
    filled = [box for box in boxes if prod(box.tensor.shape)] or list(boxes[:1])
    if _any_overlap(filled):
        raise CheckpointError("is held in pieces that overlap")
    missing = prod(shape) - sum(prod(box.tensor.shape) for box in filled)
    if missing:
        raise CheckpointError(f"is held in pieces that leave out {missing} of its {prod(shape)} elements")
    return BoxedTensor(shape, first.dtype, tuple(filled))


def _any_overlap(boxes: Sequence[Box]) -> bool:
    """Return whether two boxes share an element: each meets those that start before it ends in dim 0."""
    if len(boxes) > 1 and not boxes[0].offsets:
        return True
    in_order = sorted(boxes, key=lambda box: box.offsets)
    for position, box in enumerate(in_order):
        for later in in_order[position + 1 :]:
            if later.offsets[0] >= box.ends[0]:
                break
            if all(start < end for start, end in zip(later.offsets, box.ends, strict=True)) and all(
                start < end for start, end in zip(box.offsets, later.ends, strict=True)
            ):
                return True
    return False
