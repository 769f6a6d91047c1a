"""Merge the shards that the TP ranks hold of a parameter into the full tensor, by where its chunks lie in them.

A tensor counts as rows (dim 0) by columns (all other dims), so that consecutive rows can be read without the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import torch

from tpcheck.backends.checkpoint_format import Extent
from tpcheck.checkpoints.formats.files import Files
from tpcheck.checkpoints.formats.storage_view import StorageView

# A fused and interleaved weight has a few chunks for each head; no real layout has more than this.
_MAX_CHUNKS = 100_000


class LayoutError(ValueError):
    """A layout that reaches beyond the tensor or the shard, or has elements not once."""


@dataclass(frozen=True, slots=True)
class ShardChunk:
    """A rectangle of the full tensor and its place in one rank's flat shard.

    Attributes:
        tp_rank: The rank whose shard holds it.
        rows: Indices of dim 0.
        columns: Indices within a row.
        start: Position of its first element in the shard.
        step: Distance of its rows in the shard; its columns are adjacent.
        scale: Factor from the full tensor to the shard.
    """

    tp_rank: int
    rows: range
    columns: range
    start: int
    step: int
    scale: float = 1.0

    @property
    def footprint(self) -> tuple[int, int, int, int]:
        return self.rows.start, self.rows.stop, self.columns.start, self.columns.stop


@dataclass(frozen=True, slots=True)
class StridedPiece:
    """Elements of a shard: the arguments of `torch.as_strided` that select them in the full tensor and in the shard."""

    shape: tuple[int, ...]
    full_offset: int
    full_strides: tuple[int, ...]
    shard_offset: int
    shard_strides: tuple[int, ...]
    scale: float = 1.0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def chunks(self, tp_rank: int, shape: Sequence[int], shard_numel: int) -> Iterator[ShardChunk]:
        """Yield the chunks that make up the piece.

        Raises:
            LayoutError: It reaches beyond the tensor or the shard, or its columns are not adjacent.
        """
        if 0 in self.shape:  # the strides of ranks without elements are 0
            return
        self._require_inside(prod(shape), shard_numel)
        width = prod(shape[1:])
        dims = [dim for dim in zip(self.shape, self.full_strides, self.shard_strides, strict=True) if dim[0] > 1]
        of_rows = _merged([dim for dim in dims if dim[1] % width == 0])
        of_columns = _merged([dim for dim in dims if dim[1] % width])
        num_rows, step = _run_length(of_rows, unit=width)
        num_columns, next_column = _run_length(of_columns, unit=1)
        if num_columns > 1 and next_column != 1:
            raise LayoutError("its columns are not adjacent in the shard")
        outer = [*of_rows[: len(of_rows) - (num_rows > 1)], *of_columns[: len(of_columns) - (num_columns > 1)]]
        if prod(size for size, _, _ in outer) > _MAX_CHUNKS:
            raise LayoutError(f"it has more than {_MAX_CHUNKS} chunks")
        for index in product(*(range(size) for size, _, _ in outer)):
            full = self.full_offset + sum(i * stride for i, (_, stride, _) in zip(index, outer, strict=True))
            shard = self.shard_offset + sum(i * stride for i, (_, _, stride) in zip(index, outer, strict=True))
            row, column = divmod(full, width)
            if column + num_columns > width:
                raise LayoutError("a row of it runs into the next row of the tensor")
            rows, columns = range(row, row + num_rows), range(column, column + num_columns)
            yield ShardChunk(tp_rank, rows, columns, shard, step or num_columns, self.scale)

    def _require_inside(self, numel: int, shard_numel: int) -> None:
        if not len(self.shape) == len(self.full_strides) == len(self.shard_strides):
            raise LayoutError("its shape and strides have different numbers of dims")
        sides = (self.full_offset, self.full_strides, numel), (self.shard_offset, self.shard_strides, shard_numel)
        for offset, strides, limit in sides:
            steps = [stride for size, stride in zip(self.shape, strides, strict=True) if size > 1]
            if min((offset, *self.shape)) < 0 or min(steps, default=1) < 1:
                raise LayoutError("it has a negative size or offset, or a stride below 1")
            last = offset + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))
            if last >= limit:
                raise LayoutError(f"it reaches element {last} of {limit}")


def cut_into_pieces(
    shape: Sequence[int], dim: int, widths: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[StridedPiece, ...], ...]]:
    """Return each rank's shard shape and pieces for a dim that consists of blocks, each cut over the ranks.

    Args:
        shape: Shape of the full tensor.
        dim: The dim that is cut.
        widths: For each block, the share of each rank.
    """
    num_ranks = len(widths[0])
    full_strides = _row_major(shape)
    shapes = tuple(
        tuple(sum(block[rank] for block in widths) if i == dim else size for i, size in enumerate(shape))
        for rank in range(num_ranks)
    )
    pieces: list[list[StridedPiece]] = [[] for _ in range(num_ranks)]
    start, local_start = 0, [0] * num_ranks
    for block in widths:
        for rank, width in enumerate(block):
            strides = _row_major(shapes[rank])
            size = tuple(width if i == dim else size for i, size in enumerate(shape))
            offsets = start * full_strides[dim], local_start[rank] * strides[dim]
            pieces[rank].append(StridedPiece(size, offsets[0], full_strides, offsets[1], strides))
            start += width
            local_start[rank] += width
    return shapes, tuple(map(tuple, pieces))


def require_tiling(chunks: Iterable[ShardChunk], shape: Sequence[int]) -> None:
    """Raise LayoutError unless the chunks hold every element once; several ranks may hold the same chunk."""
    footprints = sorted({chunk.footprint for chunk in chunks})
    edges = sorted({edge for _, _, start, stop in footprints for edge in (start, stop)} | {0, prod(shape[1:])})
    if 0 in shape:
        return
    if sum(len(edges) for _ in footprints) > 20 * _MAX_CHUNKS:
        raise LayoutError("it has too many chunks")
    for left, right in pairwise(edges):
        next_row = 0
        for row, end, start, stop in footprints:
            if start <= left and right <= stop:
                if row != next_row:
                    problem = "leave out" if row > next_row else "repeat"
                    raise LayoutError(f"its pieces {problem} row {min(row, next_row)}")
                next_row = end
        if next_row != (shape[0] if shape else 1):
            raise LayoutError(f"its pieces leave out row {next_row}")


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _merged(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join adjacent (size, stride, stride) that are one run in the full tensor and in the shard."""
    merged: list[tuple[int, int, int]] = []
    for size, full, shard in dims:
        if merged and merged[-1][1:] == (size * full, size * shard):
            size *= merged.pop()[0]
        merged.append((size, full, shard))
    return merged


def _run_length(dims: list[tuple[int, int, int]], *, unit: int) -> tuple[int, int]:
    """Return the size of the innermost dim and its stride in the shard, if its stride in the full tensor is `unit`."""
    if dims and dims[-1][1] == unit:
        return dims[-1][0], dims[-1][2]
    return 1, 0


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
