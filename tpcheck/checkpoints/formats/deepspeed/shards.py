"""One rank's shard of a parameter, and a whole tensor put together from the shards of the TP ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from tpcheck.backends.checkpoint_format import Extent
from tpcheck.checkpoints.formats.deepspeed.boxes import Box, Strided, require_tiling
from tpcheck.checkpoints.formats.files import Files
from tpcheck.checkpoints.formats.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive elements of a stored tensor, counted row by row."""

    tensor: StoredTensor
    start: int
    numel: int

    def read(self, files: Files, start: int, stop: int) -> torch.Tensor:
        """Return elements of this segment, flat."""
        if not self.tensor.shape:
            return self.tensor.read(files, range(1)).reshape(-1)
        width = prod(self.tensor.shape[1:])
        first, last = self.start + start, self.start + stop
        rows = range(first // width, -(-last // width))
        flat = self.tensor.read(files, rows).reshape(-1)
        return flat[first - rows.start * width : last - rows.start * width]

    def extent(self) -> Extent | None:
        whole = self.tensor.extent()
        if whole is None:
            return None
        size = self.tensor.dtype.itemsize
        return Extent(whole.path, whole.offset + self.start * size, self.numel * size)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one TP rank holds of a parameter.

    Attributes:
        shape: Its shape on that rank.
        segments: Its elements in order; the partitions of ZeRO, or one tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, tensor: StoredTensor) -> Shard:
        return cls(tensor.shape, tensor.dtype, (Segment(tensor, 0, prod(tensor.shape)),))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def read(self, files: Files, start: int, stop: int) -> torch.Tensor:
        """Return elements counted row by row, flat."""
        parts, at = [], 0
        for segment in self.segments:
            first, last = max(start - at, 0), min(stop - at, segment.numel)
            if first < last:
                parts.append(segment.read(files, first, last))
            at += segment.numel
        if not parts:
            return torch.empty(0, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extent(self) -> Extent | None:
        """Return where it lies, if in one piece."""
        held = [segment for segment in self.segments if segment.numel]
        return held[0].extent() if len(held) == 1 else None


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
