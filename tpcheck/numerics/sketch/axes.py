"""Rows and columns of a local matrix: their signs, their tiles, and the runs and chunks in which they are summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import torch
import xxhash

from tpcheck.numerics.global_index import GlobalIndex
from tpcheck.numerics.sketch.row_keys import RowKeys
from tpcheck.numerics.sketch.signs import COLUMNS, ROWS, SIGN_SETS, TILES, signs_of
from tpcheck.numerics.sketch.store import is_host

# Rows of one tile that are summed in float32: one addition an element gives a sum for each of the 8 patterns of signs
# that rows have up to their first sign. A product with the patterns makes of them a sum for each set, in float32 if
# the rows are at most FEW_ROWS. All after that is float64.
CHUNK_ROWS, FEW_ROWS, PATTERNS = 128, 64, 1 << (SIGN_SETS - 1)
# Thin products of fewer rows than this cost more to start than to compute (measured: 4 to 16 are alike).
_SHORT_RUN = 8


@dataclass(frozen=True, slots=True)
class Axis:
    """The rows, or the columns, of a local matrix.

    Attributes:
        signs: (SIGN_SETS, n), 1.0 or -1.0.
        tiles: The tile of each.
        runs: Tile, first and one past the last of neighbours in one tile; empty where it would take a wait for the
            device to know them.
    """

    signs: torch.Tensor
    tiles: torch.Tensor
    runs: tuple[tuple[int, int, int], ...]
    derived: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def part(self, start: int, stop: int) -> Axis:
        if (start, stop) == (0, len(self.tiles)):
            return self
        runs = tuple(
            (tile, max(first, start) - start, min(last, stop) - start)
            for tile, first, last in self.runs
            if first < stop and last > start
        )
        return Axis(self.signs[:, start:stop], self.tiles[start:stop], runs)

    @property
    def has_long_runs(self) -> bool:
        return 0 < len(self.runs) * _SHORT_RUN <= len(self.tiles)

    def present(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tiles that have any row, and for each row which of them is its tile."""
        if "present" not in self.derived:
            self.derived["present"] = torch.unique(self.tiles, return_inverse=True)
        present: tuple[torch.Tensor, torch.Tensor] = self.derived["present"]
        return present

    def chunks(self, height: int) -> tuple[Chunks, ...]:
        """Return the chunks of blocks of up to `height` rows, which end where tiles end if they can."""
        if height not in self.derived:
            blocks = _blocks_of_runs(self.runs, height)
            self.derived[height] = tuple(Chunks.of(self, start, stop) for start, stop in blocks)
        chunks: tuple[Chunks, ...] = self.derived[height]
        return chunks

    def cut_signs(self) -> torch.Tensor | None:
        """Return the signs as (SIGN_SETS * runs, length, 1), or None where runs are not of one length."""
        if "cut" not in self.derived:
            lengths = {stop - start for _, start, stop in self.runs}
            is_even = len(lengths) == 1
            self.derived["cut"] = self.signs.reshape(SIGN_SETS * len(self.runs), -1, 1) if is_even else None
        cut: torch.Tensor | None = self.derived["cut"]
        return cut


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """Up to CHUNK_ROWS rows of one tile each, in a block of neighbouring rows.

    Attributes:
        start, stop: The rows of the block.
        tiles: The tile of each chunk, as a number among those that have any row.
        first, last: The lowest tile, and one past the highest one.
        per_tile: Number of chunks of each tile between these; 0 where it varies.
        dtype: Of products with the patterns.
        order: Rows of the block by chunk and pattern.
        signs: The first sign of each of them, float32.
        offsets: Where in `order` each pattern of each chunk starts.
    """

    start: int
    stop: int
    tiles: torch.Tensor
    first: int
    last: int
    per_tile: int
    dtype: torch.dtype
    order: torch.Tensor
    signs: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, axis: Axis, start: int, stop: int) -> Chunks:
        tiles, signs = axis.present()[1][start:stop], axis.signs[:, start:stop]
        by_tile = tiles.argsort(stable=True)
        sizes = torch.bincount(tiles, minlength=TILES)
        num_chunks = -(-sizes // CHUNK_ROWS)
        rank_in_tile = torch.arange(len(tiles), device="cpu") - (sizes.cumsum(0) - sizes)[tiles[by_tile]]
        chunk = torch.empty_like(tiles)
        # Rows are dealt to the chunks of their tile in turn.
        chunk[by_tile] = (num_chunks.cumsum(0) - num_chunks)[tiles[by_tile]] + rank_in_tile % num_chunks[tiles[by_tile]]
        is_other = (signs[1:] != signs[0]).to(torch.int64)
        bag = chunk * PATTERNS + (is_other * (1 << torch.arange(SIGN_SETS - 1, device="cpu"))[:, None]).sum(0)
        order = bag.argsort(stable=True)
        counts = torch.bincount(bag, minlength=int(num_chunks.sum()) * PATTERNS)
        of_tiles = torch.arange(TILES, device="cpu").repeat_interleave(num_chunks)
        first, last = int(of_tiles[0]), int(of_tiles[-1]) + 1
        numbers = num_chunks[first:last].tolist()
        per_tile = numbers[0] if len({*numbers}) == 1 else 0
        most = int((-(-sizes // num_chunks.clamp(min=1))).max())
        dtype = torch.float32 if most <= FEW_ROWS else torch.float64
        offsets = counts.cumsum(0) - counts
        return cls(start, stop, of_tiles, first, last, per_tile, dtype, order, signs[0][order].float(), offsets)


def axes_of(index: GlobalIndex, device: torch.device) -> tuple[Axis, Axis]:
    """Return rows and columns of a local tensor whose last dim is columns; the signs of rows are hashed once."""
    kept = ("axes", device)
    if kept not in index.derived:
        leading = GlobalIndex(index.shape[:-1], index.indices[:-1])
        numbers = leading.positions_of(0, prod(leading.local_shape))
        rows = _axis(_Numbers(numbers), prod(index.shape[:-1]), ROWS, device)
        index.derived[kept] = (rows, flat_columns(GlobalIndex(index.shape[-1:], index.indices[-1:]), device))
    axes: tuple[Axis, Axis] = index.derived[kept]
    return axes


def flat_columns(index: GlobalIndex, device: torch.device) -> Axis:
    kept = ("columns", device)
    if kept not in index.derived:
        numbers = index.positions_of(0, prod(index.local_shape))
        index.derived[kept] = _axis(_Numbers(numbers), prod(index.shape), COLUMNS, device)
    axis: Axis = index.derived[kept]
    return axis


def keyed_axis(rows: RowKeys, device: torch.device) -> Axis:
    if device not in rows.derived:
        keys, tiles = rows.keys.to(device), rows.tiles.to(device)
        rows.derived[device] = Axis(signs_of(keys, torch.float64), tiles, _runs(tiles) if is_host(device) else ())
    axis: Axis = rows.derived[device]
    return axis


@lru_cache(maxsize=256)
def _axis(key: _Numbers, size: int, stream: int, device: torch.device) -> Axis:
    numbers = key.numbers
    tiles = numbers * TILES // max(size, 1)
    return Axis(signs_of(numbers + stream, torch.float64).to(device), tiles.to(device), _runs(tiles))


class _Numbers:
    """Numbers of rows or columns, as a key: layers have the same ones, and share what is hashed from them."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers
        self.digest = xxhash.xxh3_128_digest(numbers.numpy().data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Numbers) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def _runs(tiles: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
    values, counts = torch.unique_consecutive(tiles, return_counts=True)
    stops = counts.cumsum(0).tolist()
    return tuple(zip(values.tolist(), [0, *stops], stops, strict=False))  # one start more than stops


def _blocks_of_runs(runs: Sequence[tuple[int, int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Yield first and end of blocks of up to `most` rows: of whole runs, or of like pieces of a longer one."""
    start, end = 0, 0
    for _, first, last in runs:
        if start < first and last - start > most:
            yield start, first
            start = first
        num_pieces = -(-(last - first) // most)
        if num_pieces > 1:
            marks = [first + piece * (last - first) // num_pieces for piece in range(num_pieces + 1)]
            yield from pairwise(marks)
            start = last
        end = last
    if start < end:
        yield start, end


def batches(runs: Sequence[tuple[int, int, int]], most: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield tiles, first and end of runs: neighbours of one length together, longer ones in pieces of `most` rows."""
    number = 0
    while number < len(runs):
        tile, first, last = runs[number]
        length = last - first
        if length > most:
            yield from (((tile,), start, min(start + most, last)) for start in range(first, last, most))
            number += 1
            continue
        following = runs[number : number + most // length]
        lengths = [end - start for _, start, end in following]
        together = following[: next((n for n, each in enumerate(lengths) if each != length), len(lengths))]
        yield tuple(run[0] for run in together), first, together[-1][2]
        number += len(together)


@lru_cache(maxsize=64)
def tile_of_run(tiles: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return a matrix (runs, TILES) that adds up runs of the same tile."""
    matrix = torch.zeros(len(tiles), TILES, dtype=torch.float64, device="cpu")
    matrix[torch.arange(len(tiles), device="cpu"), torch.tensor(tiles, dtype=torch.int64, device="cpu")] = 1.0
    return matrix.to(device)
