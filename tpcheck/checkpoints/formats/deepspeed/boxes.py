"""Which rectangles of a full tensor lie where in the flat shards of the TP ranks. Integers only.

A tensor is looked at as rows (dim 0) by columns (all other dims), so that consecutive rows can be read alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

# A fused and interleaved weight has a few boxes for each head; more than this is no layout that anyone writes.
_MAX_BOXES = 100_000


class LayoutError(ValueError):
    """A layout that leaves the tensor or the shard, leaves elements out or names them twice."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the full tensor and its place in one rank's flat shard.

    Attributes:
        tp_rank: Who holds it.
        rows: Indices of dim 0.
        columns: Indices within a row.
        start: Position of its first element in the shard.
        step: Distance of its rows in the shard; columns lie next to each other.
        scale: What the full tensor was multiplied with to make the shard.
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
class Strided:
    """Elements in the arguments of `torch.as_strided`, once in the full tensor and once in the shard."""

    shape: tuple[int, ...]
    full_offset: int
    full_strides: tuple[int, ...]
    shard_offset: int
    shard_strides: tuple[int, ...]
    scale: float = 1.0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def boxes(self, tp_rank: int, shape: Sequence[int], shard_numel: int) -> Iterator[Box]:
        """Yield the rectangles it is made of.

        Raises:
            LayoutError: It leaves the tensor or the shard, or its columns do not lie next to each other.
        """
        if 0 in self.shape:  # ranks that hold nothing have strides of 0
            return
        self._require_inside(prod(shape), shard_numel)
        width = prod(shape[1:])
        dims = [dim for dim in zip(self.shape, self.full_strides, self.shard_strides, strict=True) if dim[0] > 1]
        of_rows = _merged([dim for dim in dims if dim[1] % width == 0])
        of_columns = _merged([dim for dim in dims if dim[1] % width])
        num_rows, step = _run_length(of_rows, unit=width)
        num_columns, next_column = _run_length(of_columns, unit=1)
        if num_columns > 1 and next_column != 1:
            raise LayoutError("its columns do not lie next to each other in the shard")
        outer = [*of_rows[: len(of_rows) - (num_rows > 1)], *of_columns[: len(of_columns) - (num_columns > 1)]]
        if prod(size for size, _, _ in outer) > _MAX_BOXES:
            raise LayoutError(f"it is cut into more than {_MAX_BOXES} rectangles")
        for index in product(*(range(size) for size, _, _ in outer)):
            full = self.full_offset + sum(i * stride for i, (_, stride, _) in zip(index, outer, strict=True))
            shard = self.shard_offset + sum(i * stride for i, (_, _, stride) in zip(index, outer, strict=True))
            row, column = divmod(full, width)
            if column + num_columns > width:
                raise LayoutError("a row of it runs into the next row of the tensor")
            rows, columns = range(row, row + num_rows), range(column, column + num_columns)
            yield Box(tp_rank, rows, columns, shard, step or num_columns, self.scale)

    def _require_inside(self, numel: int, shard_numel: int) -> None:
        if not len(self.shape) == len(self.full_strides) == len(self.shard_strides):
            raise LayoutError("its shape and strides differ in their number of dims")
        sides = (self.full_offset, self.full_strides, numel), (self.shard_offset, self.shard_strides, shard_numel)
        for offset, strides, limit in sides:
            steps = [stride for size, stride in zip(self.shape, strides, strict=True) if size > 1]
            if min((offset, *self.shape)) < 0 or min(steps, default=1) < 1:
                raise LayoutError("it has a negative size or offset, or a stride below 1")
            last = offset + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))
            if last >= limit:
                raise LayoutError(f"it reaches element {last} of {limit}")


def strided_cut(
    shape: Sequence[int], dim: int, widths: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[Strided, ...], ...]]:
    """Return each rank's shard shape and pieces where `dim` is made of blocks that are each cut over the ranks.

    Args:
        shape: Of the full tensor.
        dim: The dim that is cut.
        widths: For each block, each rank's share of it.
    """
    num_ranks = len(widths[0])
    full_strides = _row_major(shape)
    shapes = tuple(
        tuple(sum(block[rank] for block in widths) if i == dim else size for i, size in enumerate(shape))
        for rank in range(num_ranks)
    )
    pieces: list[list[Strided]] = [[] for _ in range(num_ranks)]
    at, local = 0, [0] * num_ranks
    for block in widths:
        for rank, width in enumerate(block):
            strides = _row_major(shapes[rank])
            size = tuple(width if i == dim else whole for i, whole in enumerate(shape))
            start, local_start = at * full_strides[dim], local[rank] * strides[dim]
            pieces[rank].append(Strided(size, start, full_strides, local_start, strides))
            at += width
            local[rank] += width
    return shapes, tuple(map(tuple, pieces))


def require_tiling(boxes: Iterable[Box], shape: Sequence[int]) -> None:
    """Check that the boxes hold every element once; several ranks may hold the same box.

    Raises:
        LayoutError: They do not.
    """
    footprints = sorted({box.footprint for box in boxes})
    edges = sorted({edge for _, _, start, stop in footprints for edge in (start, stop)} | {0, prod(shape[1:])})
    if 0 in shape:
        return
    if sum(len(edges) for _ in footprints) > 20 * _MAX_BOXES:
        raise LayoutError("it is cut into too many rectangles")
    for left, right in pairwise(edges):
        at = 0
        for row, end, start, stop in footprints:
            if start <= left and right <= stop:
                if row != at:
                    raise LayoutError(f"its pieces {'leave out' if row > at else 'repeat'} row {min(row, at)}")
                at = end
        if at != (shape[0] if shape else 1):
            raise LayoutError(f"its pieces leave out row {at}")


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _merged(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join neighbouring (size, stride, stride) that are one run on both sides."""
    merged: list[tuple[int, int, int]] = []
    for size, full, shard in dims:
        if merged and merged[-1][1:] == (size * full, size * shard):
            size *= merged.pop()[0]
        merged.append((size, full, shard))
    return merged


def _run_length(dims: list[tuple[int, int, int]], *, unit: int) -> tuple[int, int]:
    """Return the size of the innermost dim and its distance in the shard, if it walks the full tensor by `unit`."""
    if dims and dims[-1][1] == unit:
        return dims[-1][0], dims[-1][2]
    return 1, 0
