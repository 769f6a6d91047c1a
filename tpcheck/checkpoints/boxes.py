"""A tensor that several files hold in rectangular pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from tpcheck.adapters import Extent
from tpcheck.checkpoints.files import Files
from tpcheck.checkpoints.table import TensorInFiles
from tpcheck.errors import CheckpointError


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
