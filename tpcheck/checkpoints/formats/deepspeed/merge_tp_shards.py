"""Merge the shards that the TP ranks hold of a parameter into the full tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from tpcheck.backends.checkpoint_format import Extent
from tpcheck.checkpoints.formats.deepspeed.chunks import ShardChunk, StridedPiece, require_tiling
from tpcheck.checkpoints.formats.files import Files
from tpcheck.checkpoints.formats.storage_view import StorageView


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive elements of a stored tensor, counted row by row."""

    tensor: StorageView
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
        extent = self.tensor.extent()
        if extent is None:
            return None
        itemsize = self.tensor.dtype.itemsize
        return Extent(extent.path, extent.offset + self.start * itemsize, self.numel * itemsize)


@dataclass(frozen=True, slots=True)
class Shard:
    """The shard of a parameter on one TP rank.

    Attributes:
        shape: Shape of the shard.
        segments: Its elements in order: partitions of ZeRO, or one tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, tensor: StorageView) -> Shard:
        return cls(tensor.shape, tensor.dtype, (Segment(tensor, 0, prod(tensor.shape)),))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def read(self, files: Files, start: int, stop: int) -> torch.Tensor:
        """Return elements counted row by row, flat."""
        parts, position = [], 0
        for segment in self.segments:
            first, last = max(start - position, 0), min(stop - position, segment.numel)
            if first < last:
                parts.append(segment.read(files, first, last))
            position += segment.numel
        if not parts:
            return torch.empty(0, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extent(self) -> Extent | None:
        """Return where it lies, or None where it does not lie in one piece."""
        filled = [segment for segment in self.segments if segment.numel]
        return filled[0].extent() if len(filled) == 1 else None


_COMPARED_AT_ONCE = 4 << 20
"""Elements of two replicas that are compared at once."""


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A full tensor made of the shards of all TP ranks.

    Attributes:
        chunks: The chunks that it is read from, which hold each element once.
        copies: Further chunks, each of which should hold the same elements as one of those.
        shards: The shards by tp_rank.
    """

    shape: tuple[int, ...]
    chunks: tuple[ShardChunk, ...]
    copies: tuple[ShardChunk, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def of(
        cls, shape: Sequence[int], shards: Sequence[Shard], pieces: Sequence[Sequence[StridedPiece]]
    ) -> MergedTensor:
        """Merge shards by the pieces of each rank.

        Raises:
            LayoutError: The pieces do not make up the tensor.
        """
        chunks = [
            chunk
            for tp_rank, (shard, shard_pieces) in enumerate(zip(shards, pieces, strict=True))
            for piece in shard_pieces
            for chunk in piece.chunks(tp_rank, shape, shard.numel)
        ]
        require_tiling(chunks, shape)
        chunks.sort(key=lambda chunk: (chunk.footprint, chunk.tp_rank))
        first: dict[tuple[int, ...], ShardChunk] = {}
        for chunk in chunks:
            first.setdefault(chunk.footprint, chunk)
        copies = tuple(chunk for chunk in chunks if first[chunk.footprint] is not chunk)
        return cls(tuple(shape), tuple(first.values()), copies, tuple(shards))

    @classmethod
    def replicated(cls, shards: Sequence[Shard]) -> MergedTensor:
        """Return the tensor that every rank should hold in full; all shards have one shape."""
        shape = shards[0].shape
        chunks = tuple(
            ShardChunk(tp_rank, range(shape[0] if shape else 1), range(prod(shape[1:])), 0, prod(shape[1:]))
            for tp_rank in range(len(shards))
        )
        return cls(shape, chunks[:1], chunks[1:], tuple(shards))

    @property
    def dtype(self) -> torch.dtype:
        return next((shard.dtype for shard in self.shards if shard.numel), self.shards[0].dtype)

    def read(self, files: Files, rows: range) -> torch.Tensor:
        """Return consecutive indices of dim 0; a scalar for any rows."""
        if not self.shape:
            rows = range(1)
        table = torch.empty(len(rows), prod(self.shape[1:]), dtype=self.dtype)
        for chunk in self.chunks:
            wanted = range(max(rows.start, chunk.rows.start), min(rows.stop, chunk.rows.stop))
            if wanted:
                place = table[wanted.start - rows.start : wanted.stop - rows.start]
                place[:, chunk.columns.start : chunk.columns.stop] = self._read(files, chunk, wanted)
        return table.reshape((len(rows), *self.shape[1:]) if self.shape else ())

    def extent(self) -> Extent | None:
        """Return where it lies, or None unless one rank's shard is the full tensor."""
        chunk = self.chunks[0] if len(self.chunks) == 1 else None
        if chunk is None or chunk.scale != 1 or self.shards[chunk.tp_rank].shape != self.shape:
            return None
        return self.shards[chunk.tp_rank].extent()

    def differing_ranks(self, files: Files) -> tuple[int, int] | None:
        """Return the first two ranks whose copies of the same elements differ in any bit, or None."""
        owners = {chunk.footprint: chunk for chunk in self.chunks}
        for copy in self.copies:
            owner = owners[copy.footprint]
            for rows in _spans(copy.rows, max(1, _COMPARED_AT_ONCE // len(copy.columns))):
                if not same_bits(self._read(files, owner, rows), self._read(files, copy, rows)):
                    return owner.tp_rank, copy.tp_rank
        return None

    def _read(self, files: Files, chunk: ShardChunk, rows: range) -> torch.Tensor:
        width = len(chunk.columns)
        start = chunk.start + (rows.start - chunk.rows.start) * chunk.step
        span = (len(rows) - 1) * chunk.step + width
        flat = self.shards[chunk.tp_rank].read(files, start, start + span)
        table = flat.as_strided((len(rows), width), (chunk.step, 1), flat.storage_offset())
        return table if chunk.scale == 1 else table / chunk.scale


def _spans(rows: range, length: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, length):
        yield range(start, min(start + length, rows.stop))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors of one dtype have the same bits."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
