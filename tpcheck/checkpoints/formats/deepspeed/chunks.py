"""Where the chunks of a full tensor lie in the flat shards of the TP ranks. Integers only.

A tensor counts as rows (dim 0) by columns (all other dims), so that consecutive rows can be read without the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

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
