"""A whole tensor, put together from the shards of the TP ranks a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from tpcheck.adapters import Extent
from tpcheck.checkpoints.deepspeed_training.boxes import Box, Strided, require_tiling
from tpcheck.checkpoints.deepspeed_training.shards import Shard
from tpcheck.checkpoints.files import Files

_AT_ONCE = 4 << 20
"""Elements of two replicas that are compared at once."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A tensor of the model.

    Attributes:
        boxes: What it is read from: each element once.
        copies: Boxes that hold the same as one of those.
        shards: By tp_rank.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    copies: tuple[Box, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shape: Sequence[int], shards: Sequence[Shard], pieces: Sequence[Sequence[Strided]]) -> Merged:
        """Put shards together by each rank's pieces.

        Raises:
            LayoutError: The pieces do not make up the tensor.
        """
        boxes = [
            box
            for tp_rank, (shard, own) in enumerate(zip(shards, pieces, strict=True))
            for piece in own
            for box in piece.boxes(tp_rank, shape, shard.numel)
        ]
        require_tiling(boxes, shape)
        boxes.sort(key=lambda box: (box.footprint, box.tp_rank))
        first: dict[tuple[int, ...], Box] = {}
        for box in boxes:
            first.setdefault(box.footprint, box)
        copies = tuple(box for box in boxes if first[box.footprint] is not box)
        return cls(tuple(shape), tuple(first.values()), copies, tuple(shards))

    @classmethod
    def replicated(cls, shards: Sequence[Shard]) -> Merged:
        """Return what every rank holds whole; all shards have one shape."""
        shape = shards[0].shape
        boxes = tuple(
            Box(tp_rank, range(shape[0] if shape else 1), range(prod(shape[1:])), 0, prod(shape[1:]))
            for tp_rank in range(len(shards))
        )
        return cls(shape, boxes[:1], boxes[1:], tuple(shards))

    @property
    def dtype(self) -> torch.dtype:
        return next((shard.dtype for shard in self.shards if shard.numel), self.shards[0].dtype)

    def read(self, files: Files, rows: range) -> torch.Tensor:
        """Return consecutive indices of dim 0; a scalar for any rows."""
        if not self.shape:
            rows = range(1)
        table = torch.empty(len(rows), prod(self.shape[1:]), dtype=self.dtype)
        for box in self.boxes:
            wanted = range(max(rows.start, box.rows.start), min(rows.stop, box.rows.stop))
            if wanted:
                place = table[wanted.start - rows.start : wanted.stop - rows.start]
                place[:, box.columns.start : box.columns.stop] = self._read(files, box, wanted)
        return table.reshape((len(rows), *self.shape[1:]) if self.shape else ())

    def extent(self) -> Extent | None:
        """Return where it lies, if one rank's shard is all of it."""
        box = self.boxes[0] if len(self.boxes) == 1 else None
        if box is None or box.scale != 1 or self.shards[box.tp_rank].shape != self.shape:
            return None
        return self.shards[box.tp_rank].extent()

    def differing_ranks(self, files: Files) -> tuple[int, int] | None:
        """Return two ranks whose copies of the same elements are not the same bits."""
        owners = {box.footprint: box for box in self.boxes}
        for copy in self.copies:
            owner = owners[copy.footprint]
            for rows in _spans(copy.rows, max(1, _AT_ONCE // len(copy.columns))):
                if not same_bits(self._read(files, owner, rows), self._read(files, copy, rows)):
                    return owner.tp_rank, copy.tp_rank
        return None

    def _read(self, files: Files, box: Box, rows: range) -> torch.Tensor:
        width = len(box.columns)
        start = box.start + (rows.start - box.rows.start) * box.step
        span = (len(rows) - 1) * box.step + width
        flat = self.shards[box.tp_rank].read(files, start, start + span)
        table = flat.as_strided((len(rows), width), (box.step, 1), flat.storage_offset())
        return table if box.scale == 1 else table / box.scale


def _spans(rows: range, length: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, length):
        yield range(start, min(start + length, rows.stop))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare the bits of tensors of one dtype; NaN equals itself."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
