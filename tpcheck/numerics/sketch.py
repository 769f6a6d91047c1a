"""A tensor in eight kilobytes: signed sums of its tiles, which add up over the shards of any cut.

Seen as rows x columns, a tensor X has 16 x 16 tiles: row * 16 // rows, column * 16 // columns. With random signs r(row)
and c(column), hashed from the *global* row and column, the sketch holds for each tile the sum of r(row) c(column) X
over its elements, and that for SIGN_SETS independent sets of signs. It is linear, so the sketch of a difference is the
difference of sketches, and the sketches of shards and of the terms of a `Partial` add up to the whole's. Rows may be
named by content (`RowKeys`): then the sum is the same in whatever order, on whatever rank and in whatever micro-batch
they are. Vectors and scalars have 256 tiles along their length, and an independent sign for each element.

How far estimates spread. Let e be the squared Frobenius norm, e_ij that of tile (i, j), e_i that of a band of rows, e_j
of a band of columns. The estimate of e, the mean over sign sets of the squared tiles, is unbiased, and its variance is
at most (4 sum e_ij^2 + 2 sum e_i^2 + 2 sum e_j^2) / SIGN_SETS. Proof: for tiles A, B of one band of rows,
cov(|A'r|^2, |B'r|^2) <= 2 |AA'| |BB'| <= 2 e_A e_B, likewise for columns; for one tile the fourth moment of r'Ac is at
most 9 e_A^2, its variance 8 e_A^2 = (4 + 2 + 2) e_A^2; tiles that share no band are independent. So:

- rank one, spread evenly over the tiles (the worst of what is spread): standard deviation 0.26 e, 13 % of the norm;
- one tile alone of rank one: 1.41 e; dense differences without structure: 0.04 e, 2 % of the norm;
- one element: exact; one row or column, spread evenly along it: 0.18 e; a vector, spread evenly: 0.04 e.

The signs of a product have heavier tails than independent ones; raise SIGN_SETS where a verdict hangs on one tile.

How far it is rounded. Sums are float64. On the CPU those of a large float32, bfloat16 or float16 matrix begin in
float32. Up to 64 rows of one tile make sums of about 8 that have the same signs, and then sums of these 8; up to 128
rows make sums of about 16, which are added in float64. With u = 2^-24, a sum of k terms of size x and random signs has
partial sums of sqrt(j) x, and rounds each by at most u / sqrt(3) of it (root mean square): together k u x / sqrt(6).
Sums of n rows, whose number varies by chance (the mean of k^2 is n + 1 times that of k), make sqrt((n + 1) / 6) u of
the norm, sums of 8 of them sqrt(8 / 6) u: in both ways sqrt(17 / 6) u, FLOAT32_ROUNDING = 1.7 u, however large the
tensor (measured on normal numbers: 0.8 to 1.4 u; rounding the elements themselves is 0.6 u). The sum of squares is then
exact to 2 u. Otherwise (float64, and up to 65536 elements) a sketch is exact to 1e-15 of the norm. On a device products
of bfloat16 and float16 are float32.

What it costs: one pass. 1536 x 768 on one core: 0.66 ms in float32, 1.4 in float64. Nothing is random and no order
varies: the same tensor, the same sketch.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, repeat
from math import prod
from threading import Lock
from typing import Any

import torch
import xxhash

from tpcheck.core.digests import BlockDigest, odd_keys, splitmix
from tpcheck.core.errors import UsageError
from tpcheck.numerics.global_index import PADDING, GlobalIndex

__all__ = [
    "SIGN_SETS",
    "TILES",
    "GlobalIndex",
    "PendingSketch",
    "RowKeys",
    "Sketch",
    "distance",
    "fetch_sketches",
    "keys_of_sums",
    "row_keys",
    "sample_keys",
    "sketch",
    "slice_sums",
    "start_sketch",
]

SIGN_SETS = 4
TILES = 16  # along the rows and along the columns

_ALL_TILES = tuple(range(TILES))
_NUM_SUMS = SIGN_SETS * TILES * TILES
_PACKED = _NUM_SUMS + 2
_BLOCK_ROWS = 128  # 1 MiB
# Streams of the hash, far apart: a row and a column of the same number have unrelated signs.
_ROWS, _COLUMNS, _ELEMENTS, _POSITIONS = 1 << 60, 2 << 60, 3 << 60, 1 << 59
# Elements that are converted at once: 1 MiB of float64 stays in a core's cache, where twice as much takes a third more
# time on busy cores, and half as much more calls; a device wants few, large kernels.
_BLOCK, _DEVICE_BLOCK = 1 << 17, 1 << 24
_CHUNK = 1 << 16  # elements whose signs are hashed one by one: bounds what is kept for a vector to 5 MiB
# Rows of one tile that are summed in float32: one addition an element gives a sum for each of the 8 patterns of signs
# that rows have up to their first sign. A product with the patterns makes of them a sum for each set, in float32 if
# the rows are at most _FEW_ROWS. All after that is float64.
_CHUNK_ROWS, _FEW_ROWS, _PATTERNS = 128, 64, 1 << (SIGN_SETS - 1)
_SUMMED_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32_BLOCK = 1 << 18  # elements: 1 MiB, as _BLOCK
_WIDEST = 1 << 14  # columns at once: bounds what a vocabulary needs to 12 MiB
# Measured on 262144 numbers that are all equal, whose roundings add up: 1 u and 30 us; of 384 at a time 7 u and 27 us.
_SQUARES = 128
# Of a mean square in float32: what underflows in it is below 2^-149 an element.
_LEAST_SQUARE = 2.0**-119
FLOAT32_ROUNDING = math.sqrt((max(_CHUNK_ROWS, _FEW_ROWS + _PATTERNS**2) / _PATTERNS + 1) / 6) * 2.0**-24
"""Rounding of a sketch that is summed in float32, relative to the norm: derived in the module's docstring."""
# Thin products of fewer rows than this cost more to start than to compute (measured: 4 to 16 are alike).
_SHORT_RUN = 8
_SMALL = 1 << 16  # elements: below, one product over all rows costs less than sixteen (measured: 0.15 against 0.3 ms)


@dataclass(frozen=True, slots=True, eq=False)
class RowKeys:
    """Names of rows by content, so that a sum over rows is the same wherever and in whatever order they are.

    Keep them for all tensors with these rows: what is derived from them is kept with them.

    Attributes:
        keys: One int64 for each row.
        tiles: The tile of each row, int64 from 0 to TILES - 1.
    """

    keys: torch.Tensor
    tiles: torch.Tensor
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is kept of a tensor; sums, differences and multiples of sketches are those of the tensors.

    Attributes:
        tiles: (SIGN_SETS, TILES, TILES), float64 on the CPU: for each set of signs the signed sum of each tile.
        sum_squares: Of the finite elements. It adds up over shards, not over terms of a sum; NaN in a difference.
        numel: Number of elements.
        nonfinite: How many are infinite or NaN; they count as 0 in the sums.
    """

    tiles: torch.Tensor
    sum_squares: float
    numel: int
    nonfinite: int

    @classmethod
    def zero(cls) -> Sketch:
        """Return the sketch of a tensor without elements: what a sum starts with."""
        return cls(torch.zeros(SIGN_SETS, TILES, TILES, dtype=torch.float64, device="cpu"), 0.0, 0, 0)

    def __add__(self, other: Sketch) -> Sketch:
        return Sketch(
            self.tiles + other.tiles,
            self.sum_squares + other.sum_squares,
            self.numel + other.numel,
            self.nonfinite + other.nonfinite,
        )

    def __sub__(self, other: Sketch) -> Sketch:
        numel = max(self.numel, other.numel)
        return Sketch(self.tiles - other.tiles, math.nan, numel, self.nonfinite + other.nonfinite)

    def scaled(self, factor: float) -> Sketch:
        """Return the sketch of the tensor times `factor`."""
        return Sketch(self.tiles * factor, self.sum_squares * factor**2, self.numel, self.nonfinite)

    @property
    def norm(self) -> float:
        """Estimate of the tensor's Frobenius norm; its square is unbiased."""
        return float(torch.linalg.vector_norm(self.tiles)) / math.sqrt(SIGN_SETS)

    def tile_norms(self) -> torch.Tensor:
        """Return the estimate of each tile's norm, (TILES, TILES)."""
        return self.tiles.square().mean(0).sqrt()


def distance(actual: Sketch, expected: Sketch) -> float:
    """Estimate the Frobenius norm of the difference of two tensors; its square is unbiased."""
    return (actual - expected).norm


@dataclass(frozen=True, slots=True)
class PendingSketch:
    """A sketch on its tensor's device.

    Attributes:
        block: (n, _PACKED), float64, of n sketches.
        row: Which of them this is.
        numel: Number of elements.
    """

    block: torch.Tensor
    row: int
    numel: int

    @property
    def packed(self) -> torch.Tensor:
        """Signed sums, sum of squares, number of non-finite elements; float64, flat."""
        return self.block[self.row]

    def add(self, other: PendingSketch) -> PendingSketch:
        """Return the sum, on the device: of two micro-batches, shards or terms."""
        block, row = _new_row(self.block.device)
        with torch.no_grad():
            torch.add(self.packed, other.packed, out=block[row])
        return PendingSketch(block, row, self.numel + other.numel)


class _HostRows:
    """Rows for sketches on the CPU, in blocks of memory of their own, each free when none of its rows is in use.

    Sketches are made between activations and outlive them. In the heap of malloc each would keep apart the room that
    two activations leave, so that gradients do not fit there: a step of 126M parameters then has 100 MiB more.
    """

    def __init__(self) -> None:
        self._lock = Lock()  # backward hooks may run on a thread of their own
        self._unused: Iterator[tuple[torch.Tensor, int]] = iter(())

    def take(self) -> tuple[torch.Tensor, int]:
        """Return a block and the number of a row of it that is all 0 and was never used."""
        with self._lock:
            taken = next(self._unused, None)
            if taken is None:
                self._unused = zip(repeat(_new_block()), range(_BLOCK_ROWS), strict=False)
                taken = next(self._unused)
            return taken


_host_rows = _HostRows()


def _new_block() -> torch.Tensor:
    # By default forks would share it. Filled with pages at once, a row costs 5 us in place of 9.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    memory = mmap.mmap(-1, _BLOCK_ROWS * _PACKED * 8, flags=flags)
    with torch.inference_mode(False):  # a tensor that is made in inference mode cannot be written to after it
        return torch.frombuffer(memory, dtype=torch.float64).view(_BLOCK_ROWS, _PACKED)


def _new_row(device: torch.device) -> tuple[torch.Tensor, int]:
    """Return a block and the number of a row of it for a new sketch: all 0."""
    if is_host(device):
        return _host_rows.take()
    # A device's allocator keeps small tensors apart, and orders what is freed by streams.
    return torch.zeros(1, _PACKED, dtype=torch.float64, device=device), 0


def sketch(
    tensor: torch.Tensor, index: GlobalIndex | None = None, *, rows: RowKeys | None = None, scale: float = 1.0
) -> Sketch:
    """Return the sketch of `scale` times a tensor; see `start_sketch`."""
    return fetch_sketches([start_sketch(tensor, index, rows=rows, scale=scale)])[0]


def start_sketch(
    tensor: torch.Tensor,
    index: GlobalIndex | None = None,
    *,
    rows: RowKeys | None = None,
    scale: float = 1.0,
    digest: BlockDigest | None = None,
) -> PendingSketch:
    """Compute the sketch of `scale` times a tensor on its device, without waiting for it.

    Args:
        tensor: Local elements: numbers, bools or complex numbers, which count as two columns.
        index: Where they are in the whole tensor; with `rows`, of the dims beyond the rows, which together are columns.
            None where all of it is here.
        rows: Names of the rows, which are then the leading dims; in the order of the flattened leading dims.
        scale: Multiplies every element.
        digest: Of the tensor; gets the blocks that are read, where these are its memory from start to end.

    Raises:
        UsageError: The tensor does not have the shape that the index or the rows say.

    Example:
        >>> from tpcheck.core.placement import Shard
        >>> whole = torch.arange(12.0).reshape(4, 3)
        >>> top, bottom = (GlobalIndex.shard((4, 3), Shard(0), 2, rank) for rank in range(2))
        >>> distance(sketch(whole[:2], top) + sketch(whole[2:], bottom), sketch(whole))
        0.0
    """
    with torch.no_grad(), _without_autocast(tensor.device.type):
        values = tensor.detach()
        numel = values.numel() - (0 if index is None else _num_padding(index))
        if values.is_complex():
            values = torch.view_as_real(values.resolve_conj())
            if rows is None or index is not None:
                values = values.flatten(-2 if values.dim() > 1 else 0)
            index = None if index is None else _as_real(index)
        sums = _Sums(values.device, _product_dtype(values), digest)
        if rows is not None:
            _add_keyed_rows(sums, values, index, rows)
        else:
            index = _shared(index) if index is not None else _whole(tuple(values.shape))
            _require_shape(values, index)
            if index.positions is None and len(index.shape) > 1:
                _add_matrix(sums, values, index)
            else:
                _add_elements(sums, values.reshape(-1), index)
        return PendingSketch(*sums.packed(scale), numel)


def fetch_sketches(pending: Sequence[PendingSketch]) -> list[Sketch]:
    """Copy all sketches to the host at once, and wait for them."""
    if not pending:
        return []
    device = pending[0].block.device
    if any(sketch.block.device != device for sketch in pending):  # layers of a pipeline in one process
        return [fetched for sketch in pending for fetched in fetch_sketches([sketch])]
    if is_host(device):
        rows = [sketch.packed for sketch in pending]
        counts = [row[_NUM_SUMS:].tolist() for row in rows]
    else:
        packed = _to_host(torch.stack([sketch.packed for sketch in pending]))
        rows, counts = [*packed], packed[:, _NUM_SUMS:].tolist()
    return [
        Sketch(row[:_NUM_SUMS].view(SIGN_SETS, TILES, TILES), sum_squares, started.numel, int(nonfinite))
        for row, (sum_squares, nonfinite), started in zip(rows, counts, pending, strict=True)
    ]


def _to_host(packed: torch.Tensor) -> torch.Tensor:
    if not packed.is_cuda:
        return packed.cpu()
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return host


def row_keys(samples: torch.Tensor, length: int, positions: torch.Tensor | None = None) -> RowKeys:
    """Return the keys of the rows of a [B, length, ...] tensor, for B samples with these keys, on their device.

    For a [length, B, ...] tensor transpose `keys` and `tiles`, seen as [B, length].

    Args:
        positions: Those of `length` that are here, int64 [n] or [B, n]; None for all.
    """
    if positions is None:
        positions = torch.arange(length, dtype=torch.int64, device=samples.device)
    keys = splitmix(samples[:, None] ^ splitmix(positions + _POSITIONS))
    tiles = (positions * TILES // max(length, 1)).expand_as(keys)
    return RowKeys(keys.reshape(-1), tiles.reshape(-1))


def sample_keys(leaf: torch.Tensor) -> torch.Tensor:
    """Return a digest of each sample's content, int64 [B], of a [B, ...] tensor; the same on every device.

    Integers of any width have equal digests. Two multilinear sums of 64 bits with odd keys: one changed element always
    changes them, and two samples share both with a probability of 2^-62 (as in `core.digests`).
    """
    with torch.no_grad():
        words = _as_words(leaf.detach())
        batch, length = words.shape
        sums = torch.zeros(2, batch, dtype=torch.int64, device=leaf.device)
        for stream in (0, 1):
            for start in range(0, length, _CHUNK):
                chunk = words[:, start : start + _CHUNK].to(torch.int64)
                sums[stream] += (chunk * odd_keys((stream << 40) + start, chunk.shape[1], leaf.device)).sum(1)
        return keys_of_sums(sums, length)


def slice_sums(leaf: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what a slice adds to the sums of each whole sample, int64 [2, B], and the words of one position.

    Sums over slices that make up whole samples are what `keys_of_sums` turns into the digests of `sample_keys`.

    Args:
        leaf: [B, n, ...], n positions of each sample.
        positions: Which these are, int64 [n] or [B, n].
    """
    with torch.no_grad():
        words = _as_words(leaf.detach())
        batch, number = leaf.shape[:2]
        width = words.shape[1] // max(number, 1)
        words = words.to(torch.int64).reshape(batch, number, width)
        index = positions[..., None] * width + torch.arange(width, device=leaf.device)
        sums = [(words * (splitmix(index + (stream << 40)) | 1)).sum((1, 2)) for stream in (0, 1)]
        return torch.stack(sums), width


def keys_of_sums(sums: torch.Tensor, num_words: int) -> torch.Tensor:
    """Return the digests of samples of so many words with these multilinear sums, [2, B]."""
    digests = torch.full_like(sums[0], num_words)
    for of_stream in sums:
        digests = splitmix(digests ^ of_stream)
    return digests


def _as_words(leaf: torch.Tensor) -> torch.Tensor:
    """Return a tensor as [B, words] of integers; floating-point numbers as their bits."""
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf.resolve_conj())
    flat = leaf.reshape(leaf.shape[0], prod(leaf.shape[1:]))
    if not flat.is_floating_point():
        return flat
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.contiguous().view(integers[flat.element_size()])


class _Sums:
    """The sums of one sketch while they are computed, on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, digest: BlockDigest | None = None) -> None:
        self.device = device
        self.digest = digest
        self.dtype = dtype  # of products
        self.block = _BLOCK if is_host(device) else _DEVICE_BLOCK
        self.row = _new_row(device)
        self.tiles = self.row[0][self.row[1], :_NUM_SUMS].view(SIGN_SETS, TILES, TILES)
        self.sum_squares: torch.Tensor | float = 0.0
        self.nonfinite: torch.Tensor | int = 0
        self.scratch = torch.empty(0, dtype=dtype, device="cpu")

    def clean(self, values: torch.Tensor) -> torch.Tensor:
        """Return a contiguous block in the dtype of products, infinities and NaN replaced by 0; count what it holds.

        On the CPU it is overwritten by the next call.
        """
        if is_host(self.device):
            if self.scratch.numel() < values.numel():
                self.scratch = torch.empty(values.numel(), dtype=self.dtype, device="cpu")
            flat = self.scratch[: values.numel()]
            block = flat.view(values.shape).copy_(values)
            squares = float(torch.dot(flat, flat))
            if not math.isfinite(squares):
                wrong = ~block.isfinite()
                self.nonfinite += int(wrong.sum())
                block.masked_fill_(wrong, 0.0)
                squares = float(torch.dot(flat, flat))
            self.sum_squares += squares
            return block
        block = values.to(self.dtype).contiguous()  # nothing here may wait for the device
        if values.is_floating_point():
            finite = block.isfinite()
            self.nonfinite = self.nonfinite + (block.numel() - finite.sum())
            block = block.where(finite, 0)
        self.sum_squares = self.sum_squares + block.square().sum(dtype=torch.float64)
        return block

    def packed(self, scale: float) -> tuple[torch.Tensor, int]:
        """Return the block and the row that hold the sketch of `scale` times what was added."""
        block, row = self.row
        packed = block[row]
        if is_host(self.device):
            packed[_NUM_SUMS] = self.sum_squares
            packed[_NUM_SUMS + 1] = self.nonfinite
        else:
            counts = [self.sum_squares, self.nonfinite]
            tail = [torch.as_tensor(count, dtype=torch.float64, device=self.device) for count in counts]
            torch.stack(tail, out=packed[_NUM_SUMS:])
        if scale != 1.0:
            packed[:_NUM_SUMS] *= scale
            packed[_NUM_SUMS] *= scale**2
        return self.row


@dataclass(frozen=True, slots=True)
class _Axis:
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

    def part(self, start: int, stop: int) -> _Axis:
        if (start, stop) == (0, len(self.tiles)):
            return self
        runs = tuple(
            (tile, max(first, start) - start, min(last, stop) - start)
            for tile, first, last in self.runs
            if first < stop and last > start
        )
        return _Axis(self.signs[:, start:stop], self.tiles[start:stop], runs)

    @property
    def has_long_runs(self) -> bool:
        return 0 < len(self.runs) * _SHORT_RUN <= len(self.tiles)

    def present(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tiles that have any row, and for each row which of them is its tile."""
        if "present" not in self.derived:
            self.derived["present"] = torch.unique(self.tiles, return_inverse=True)
        present: tuple[torch.Tensor, torch.Tensor] = self.derived["present"]
        return present

    def chunks(self, height: int) -> tuple[_Chunks, ...]:
        """Return the chunks of blocks of up to `height` rows, which end where tiles end if they can."""
        if height not in self.derived:
            blocks = _blocks_of_runs(self.runs, height)
            self.derived[height] = tuple(_Chunks.of(self, start, stop) for start, stop in blocks)
        chunks: tuple[_Chunks, ...] = self.derived[height]
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
class _Chunks:
    """Up to _CHUNK_ROWS rows of one tile each, in a block of neighbouring rows.

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
    def of(cls, axis: _Axis, start: int, stop: int) -> _Chunks:
        tiles, signs = axis.present()[1][start:stop], axis.signs[:, start:stop]
        by_tile = tiles.argsort(stable=True)
        sizes = torch.bincount(tiles, minlength=TILES)
        num_chunks = -(-sizes // _CHUNK_ROWS)
        rank_in_tile = torch.arange(len(tiles), device="cpu") - (sizes.cumsum(0) - sizes)[tiles[by_tile]]
        chunk = torch.empty_like(tiles)
        # Rows are dealt to the chunks of their tile in turn.
        chunk[by_tile] = (num_chunks.cumsum(0) - num_chunks)[tiles[by_tile]] + rank_in_tile % num_chunks[tiles[by_tile]]
        is_other = (signs[1:] != signs[0]).to(torch.int64)
        bag = chunk * _PATTERNS + (is_other * (1 << torch.arange(SIGN_SETS - 1, device="cpu"))[:, None]).sum(0)
        order = bag.argsort(stable=True)
        counts = torch.bincount(bag, minlength=int(num_chunks.sum()) * _PATTERNS)
        of_tiles = torch.arange(TILES, device="cpu").repeat_interleave(num_chunks)
        first, last = int(of_tiles[0]), int(of_tiles[-1]) + 1
        numbers = num_chunks[first:last].tolist()
        per_tile = numbers[0] if len({*numbers}) == 1 else 0
        most = int((-(-sizes // num_chunks.clamp(min=1))).max())
        dtype = torch.float32 if most <= _FEW_ROWS else torch.float64
        offsets = counts.cumsum(0) - counts
        return cls(start, stop, of_tiles, first, last, per_tile, dtype, order, signs[0][order].float(), offsets)


def _add_matrix(sums: _Sums, values: torch.Tensor, index: GlobalIndex) -> None:
    """Add a product of dims, or one flat part of it: up to three matrices, of which two are parts of one row."""
    rows, columns = _axes(index, sums)
    width = index.local_shape[-1]
    start, stop = index.present
    if start == stop or not width:
        return
    if index.fragment is None:
        _add_block(sums, values.reshape(-1, width), rows, columns)
        return
    kept = ("parts", sums.device)
    if kept not in index.derived:
        index.derived[kept] = [*_parts_of_fragment(start, stop, width, rows, columns)]
    flat = values.reshape(-1)
    for begin, end, of_rows, of_columns in index.derived[kept]:
        part = flat[begin - start : end - start].reshape(len(of_rows.tiles), len(of_columns.tiles))
        _add_block(sums, part, of_rows, of_columns)


def _parts_of_fragment(
    start: int, stop: int, width: int, rows: _Axis, columns: _Axis
) -> Iterator[tuple[int, int, _Axis, _Axis]]:
    """Yield the matrices of a flat part of a matrix: first element, one past the last, rows and columns."""
    first_row, last_row = -(-start // width), stop // width
    if first_row > last_row:  # a part of one row
        cuts = [(start, stop)]
    else:
        cuts = [(start, first_row * width), (first_row * width, last_row * width), (last_row * width, stop)]
    for begin, end in cuts:
        if begin < end:
            row, height, column = begin // width, max(1, (end - begin) // width), begin % width
            num_columns = (end - begin) // height
            yield begin, end, rows.part(row, row + height), columns.part(column, column + num_columns)


def _add_keyed_rows(sums: _Sums, values: torch.Tensor, index: GlobalIndex | None, rows: RowKeys) -> None:
    """Add a tensor whose leading dims are rows with keys."""
    depth = next((dim for dim in range(values.dim() + 1) if prod(values.shape[:dim]) == len(rows.keys)), None)
    if index is not None:
        depth = values.dim() - len(index.local_shape)
    if depth is None or depth < 0 or prod(values.shape[:depth]) != len(rows.keys):
        raise UsageError("rows", f"{len(rows.keys)} keys", f"one for each row of a tensor of shape {_text(values)}")
    index = _shared(index) if index is not None else _whole(tuple(values.shape[depth:]) or (1,))
    width = prod(index.local_shape)
    if index.fragment is not None or _num_padding(index) or width * len(rows.keys) != values.numel():
        raise UsageError("index", index.local_shape, f"the dims beyond the rows of a tensor of shape {_text(values)}")
    if not values.numel():
        return
    _add_block(sums, values.reshape(-1, width), _keyed_axis(rows, sums.device), _flat_columns(index, sums))


def _keyed_axis(rows: RowKeys, device: torch.device) -> _Axis:
    if device not in rows.derived:
        keys, tiles = rows.keys.to(device), rows.tiles.to(device)
        rows.derived[device] = _Axis(_signs(keys, torch.float64), tiles, _runs(tiles) if is_host(device) else ())
    axis: _Axis = rows.derived[device]
    return axis


def _add_block(sums: _Sums, matrix: torch.Tensor, rows: _Axis, columns: _Axis) -> None:
    """Add a matrix, in the cheaper order of its two thin products, along its memory."""
    tiles = sums.tiles
    if 1 <= matrix.stride(0) < matrix.stride(1):
        matrix, rows, columns, tiles = matrix.T, columns, rows, tiles.transpose(1, 2)
    is_large = is_host(sums.device) and matrix.numel() > _SMALL
    if is_large and matrix.dtype in _SUMMED_IN_FLOAT32:
        short_sums = _short_sums(matrix, rows, columns, sums.digest)
        if short_sums is not None:
            tiles += short_sums[0]
            sums.sum_squares += short_sums[1]
            return
    by_rows = is_large and rows.has_long_runs
    tiles += (_rows_first if by_rows else _columns_first)(sums, matrix, rows, columns)


def _short_sums(
    matrix: torch.Tensor, rows: _Axis, columns: _Axis, digest: BlockDigest | None
) -> tuple[torch.Tensor, float] | None:
    """Return the tiles and the sum of squares of a matrix on the CPU, by sums of a few rows in float32.

    None where float32 does not do: an element is infinite or NaN, or its square is beyond the range.
    """
    width = matrix.shape[1]
    if width > _WIDEST:
        tiles, squares = torch.zeros(SIGN_SETS, TILES, TILES, dtype=torch.float64, device="cpu"), 0.0
        for start in range(0, width, _WIDEST):
            stop = min(start + _WIDEST, width)
            part = _short_sums(matrix[:, start:stop], rows, columns.part(start, stop), None)
            if part is None:
                return None
            tiles += part[0]
            squares += part[1]
        return tiles, squares
    present = rows.present()[0]
    row_sums = _RowSums(torch.empty(len(present), SIGN_SETS, width, dtype=torch.float64, device="cpu"))
    norms: list[torch.Tensor] = []
    for chunks in rows.chunks(max(_FEW_ROWS // 2, _FLOAT32_BLOCK // width)):
        in_memory = matrix[chunks.start : chunks.stop]
        block = in_memory.to(torch.float32).contiguous()
        norms += _norms(block.view(-1))
        if digest is not None:
            digest.update(in_memory)
        by_pattern = torch.embedding_bag(block, chunks.order, chunks.offsets, per_sample_weights=chunks.signs)[0]
        row_sums.add(by_pattern, chunks)
    all_norms = (torch.cat(norms) if len(norms) > 1 else norms[0]).to(torch.float64)
    squares = float(torch.dot(all_norms, all_norms))
    if not _LEAST_SQUARE * matrix.numel() < squares < math.inf:
        return None
    of_present = _column_sums(row_sums.by_tile, columns)
    if len(present) == TILES:
        return of_present, squares
    tiles = torch.zeros(SIGN_SETS, TILES, TILES, dtype=torch.float64, device="cpu")
    tiles[:, present] = of_present
    return tiles, squares


@dataclass(slots=True)
class _RowSums:
    """Signed sums of the rows of each tile, of blocks of rows.

    Attributes:
        by_tile: (tiles that have any row, SIGN_SETS, width), float64.
        started: Tiles from this one on have no sum yet.
    """

    by_tile: torch.Tensor
    started: int = 0

    def add(self, by_pattern: torch.Tensor, chunks: _Chunks) -> None:
        """Add the sums of a block: (chunks * _PATTERNS, width), float32."""
        per_tile, first, last = chunks.per_tile or 1, chunks.first, chunks.last
        by_chunk = by_pattern.view(-1, per_tile * _PATTERNS, by_pattern.shape[1]).to(chunks.dtype)
        patterns = _patterns(per_tile, chunks.dtype).expand(len(by_chunk), -1, -1)
        is_new = chunks.per_tile > 0 and first == self.started
        if is_new and chunks.dtype == torch.float64:
            torch.bmm(patterns, by_chunk, out=self.by_tile[first:last])
        elif is_new:
            self.by_tile[first:last].copy_(torch.bmm(patterns, by_chunk))
        else:
            if self.started < last:
                self.by_tile[self.started : last] = 0.0
            tiles = chunks.tiles[::per_tile]
            self.by_tile.index_add_(0, tiles, torch.bmm(patterns, by_chunk).to(torch.float64))
        self.started = max(self.started, last)


def _norms(flat: torch.Tensor) -> list[torch.Tensor]:
    """Return norms of float32 numbers on the CPU, of _SQUARES at a time: what is summed in float32."""
    num_rows = flat.numel() // _SQUARES
    norms = torch.linalg.vector_norm(flat[: num_rows * _SQUARES].view(num_rows, _SQUARES), dim=1)
    others = flat[num_rows * _SQUARES :]
    return [norms, others.abs()] if others.numel() else [norms]


@lru_cache(maxsize=64)
def _patterns(number: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the signs (SIGN_SETS, number * _PATTERNS) of the patterns of some chunks, relative to the first sign."""
    numbers = torch.arange(_PATTERNS, device="cpu")
    others = [1.0 - 2.0 * ((numbers >> sign_set) & 1) for sign_set in range(SIGN_SETS - 1)]
    return torch.stack([torch.ones(_PATTERNS, device="cpu"), *others]).to(dtype).repeat(1, number)


def _rows_first(sums: _Sums, matrix: torch.Tensor, rows: _Axis, columns: _Axis) -> torch.Tensor:
    width = matrix.shape[1]
    is_sorted = tuple(tile for tile, _, _ in rows.runs) == _ALL_TILES  # one run a tile: its first product is its sum
    allocate = torch.empty if is_sorted else torch.zeros
    by_tile = allocate(TILES, SIGN_SETS, width, dtype=torch.float64, device=sums.device)
    started = 0
    for tiles, start, stop in _batches(rows.runs, max(1, sums.block // width)):
        block = sums.clean(matrix[start:stop]).view(len(tiles), -1, width)
        signs = rows.signs[:, start:stop].reshape(SIGN_SETS, len(tiles), -1).transpose(0, 1)
        if is_sorted and tiles[0] >= started:
            started = tiles[-1] + 1
            torch.bmm(signs, block, out=by_tile[tiles[0] : started])
        elif tiles == (*range(tiles[0], tiles[-1] + 1),):
            by_tile[tiles[0] : tiles[-1] + 1].baddbmm_(signs, block)
        else:
            by_tile.index_add_(0, torch.tensor(tiles, device=sums.device), torch.bmm(signs, block))
    return _column_sums(by_tile, columns)


def _column_sums(by_tile: torch.Tensor, columns: _Axis) -> torch.Tensor:
    """Return the signed sums of the columns: (SIGN_SETS, n, TILES) of (n, SIGN_SETS, width), perhaps overwritten."""
    num_tiles, signs = len(by_tile), columns.cut_signs()
    if signs is not None:
        cut = by_tile.view(num_tiles, len(signs), -1).transpose(0, 1)
        by_run = torch.bmm(cut, signs).view(SIGN_SETS, len(columns.runs), num_tiles).transpose(1, 2)
        tiles = tuple(tile for tile, _, _ in columns.runs)
        return by_run if tiles == _ALL_TILES else by_run @ _tile_of_run(tiles, by_tile.device)
    by_tile *= columns.signs
    tiles_sums = torch.zeros(SIGN_SETS, num_tiles, TILES, dtype=torch.float64, device=by_tile.device)
    for tile, start, stop in columns.runs:
        tiles_sums[:, :, tile] += by_tile[:, :, start:stop].sum(-1).T
    return tiles_sums


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


def _batches(runs: Sequence[tuple[int, int, int]], most: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
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


def _columns_first(sums: _Sums, matrix: torch.Tensor, rows: _Axis, columns: _Axis) -> torch.Tensor:
    num_rows, width = matrix.shape
    height = max(1, sums.block // max(width, TILES * SIGN_SETS))
    signs = columns.signs.to(sums.dtype)
    numbers = torch.arange(TILES, device=sums.device)
    # Where neighbours are in different tiles, a dense product with mostly zeros.
    is_dense = not columns.has_long_runs
    lengths = {stop - start for _, start, stop in columns.runs}
    if is_dense:
        column_tiles = tuple(range(TILES))
        weights = (signs[:, None] * (columns.tiles == numbers[:, None])).reshape(SIGN_SETS * TILES, width).T
    else:
        column_tiles = tuple(tile for tile, _, _ in columns.runs)
        weights = signs.T
    by_run = torch.zeros(SIGN_SETS, TILES, len(column_tiles), dtype=torch.float64, device=sums.device)
    for start in range(0, num_rows, height):
        block = sums.clean(matrix[start : start + height])
        if is_dense:
            products = (block @ weights).view(-1, SIGN_SETS, TILES).transpose(0, 1)
        elif len(lengths) == 1:
            cut = block.view(len(block), len(column_tiles), -1).transpose(0, 1)
            products = torch.bmm(cut, weights.reshape(len(column_tiles), -1, SIGN_SETS)).permute(2, 1, 0)
        else:
            products = torch.stack([block[:, first:last] @ weights[first:last] for _, first, last in columns.runs])
            products = products.permute(2, 1, 0)
        row_tiles = rows.tiles[start : start + height] == numbers[:, None]
        row_weights = rows.signs[:, None, start : start + height] * row_tiles
        by_run += torch.bmm(row_weights, products.to(torch.float64))
    return by_run @ _tile_of_run(column_tiles, sums.device)


def _add_elements(sums: _Sums, flat: torch.Tensor, index: GlobalIndex) -> None:
    """Add elements one by one: of vectors, scalars, and cuts that are no product of dims."""
    begin, end = index.present
    for start in range(begin, end, _CHUNK):
        stop = min(start + _CHUNK, end)
        values = flat[start - begin : stop - begin]
        order, weights, tiles, padding = _element_weights(index, start, stop, sums.device)
        if padding is not None:
            values = values.masked_fill(padding, 0)
        block = sums.clean(values).to(torch.float64)
        of_tiles, added = sums.tiles.view(SIGN_SETS, -1), (block[order] * weights).sum(-1)
        if len(tiles) == TILES**2:
            of_tiles += added
        else:
            of_tiles[:, tiles] += added


ElementWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def _element_weights(index: GlobalIndex, start: int, stop: int, device: torch.device) -> ElementWeights:
    """Return, for the elements from `start` to `stop`: their order by tile, their signs, the tiles, what is padding.

    Each tile has one line of elements in `order` (tiles, longest) and of signs (SIGN_SETS, tiles, longest); shorter
    lines are filled up with a sign of 0.
    """
    kept = (start, stop, device)
    if kept in index.derived:
        found: ElementWeights = index.derived[kept]
        return found
    positions = index.positions_of(start, stop, device="cpu")
    padding = positions == PADDING
    positions = positions.clamp(min=0)
    signs, tiles = _signs_of_elements(positions, index.shape)
    signs.masked_fill_(padding, 0.0)
    by_tile = tiles.argsort(stable=True)
    present, counts = torch.unique_consecutive(tiles[by_tile], return_counts=True)
    longest = int(counts.max())
    column = torch.arange(longest, dtype=torch.int64, device="cpu")
    ends = counts.cumsum(0)
    slots = (ends - counts)[:, None] + column
    is_filled = column < counts[:, None]
    order = by_tile[slots.clamp(max=stop - start - 1)]
    weights = signs[:, order] * is_filled
    has_padding = bool(padding.any())
    made = (order.to(device), weights.to(device), present.to(device), padding.to(device) if has_padding else None)
    if index.positions is None and prod(index.local_shape) <= _CHUNK:
        index.derived[kept] = made
    return made


def _signs_of_elements(positions: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the signs (SIGN_SETS, n) of the elements at these flat positions, and their tiles below TILES^2."""
    if len(shape) < 2:
        return _signs(positions + _ELEMENTS, torch.float64), positions * TILES**2 // max(prod(shape), 1)
    num_rows, num_columns = prod(shape[:-1]), shape[-1]
    rows, columns = positions // num_columns, positions % num_columns
    signs = _signs(rows + _ROWS, torch.float64) * _signs(columns + _COLUMNS, torch.float64)
    return signs, rows * TILES // num_rows * TILES + columns * TILES // num_columns


def _axes(index: GlobalIndex, sums: _Sums) -> tuple[_Axis, _Axis]:
    """Return rows and columns of a local tensor whose last dim is columns; the signs of rows are hashed once."""
    kept = ("axes", sums.device)
    if kept not in index.derived:
        leading = GlobalIndex(index.shape[:-1], index.indices[:-1])
        numbers = leading.positions_of(0, prod(leading.local_shape))
        rows = _axis(_Numbers(numbers), prod(index.shape[:-1]), _ROWS, sums.device)
        index.derived[kept] = (rows, _flat_columns(GlobalIndex(index.shape[-1:], index.indices[-1:]), sums))
    axes: tuple[_Axis, _Axis] = index.derived[kept]
    return axes


def _flat_columns(index: GlobalIndex, sums: _Sums) -> _Axis:
    kept = ("columns", sums.device)
    if kept not in index.derived:
        numbers = index.positions_of(0, prod(index.local_shape))
        index.derived[kept] = _axis(_Numbers(numbers), prod(index.shape), _COLUMNS, sums.device)
    axis: _Axis = index.derived[kept]
    return axis


class _Numbers:
    """Numbers of rows or columns, as a key: layers have the same ones, and share what is hashed from them."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers
        self.digest = xxhash.xxh3_128_digest(numbers.numpy().data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Numbers) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@lru_cache(maxsize=256)
def _axis(key: _Numbers, size: int, stream: int, device: torch.device) -> _Axis:
    numbers = key.numbers
    tiles = numbers * TILES // max(size, 1)
    return _Axis(_signs(numbers + stream, torch.float64).to(device), tiles.to(device), _runs(tiles))


def _runs(tiles: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
    values, counts = torch.unique_consecutive(tiles, return_counts=True)
    stops = counts.cumsum(0).tolist()
    return tuple(zip(values.tolist(), [0, *stops], stops, strict=False))  # one start more than stops


def _signs(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return SIGN_SETS signs for each key, 1 or -1: (SIGN_SETS, n)."""
    hashed = splitmix(keys)
    bits = torch.stack([(hashed >> (63 - sign_set)) & 1 for sign_set in range(SIGN_SETS)])
    return (1 - 2 * bits).to(dtype)


@lru_cache(maxsize=64)
def _tile_of_run(tiles: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return a matrix (runs, TILES) that adds up runs of the same tile."""
    matrix = torch.zeros(len(tiles), TILES, dtype=torch.float64, device="cpu")
    matrix[torch.arange(len(tiles), device="cpu"), torch.tensor(tiles, dtype=torch.int64, device="cpu")] = 1.0
    return matrix.to(device)


@lru_cache(maxsize=1024)  # shapes of a model's tensors
def _whole(shape: tuple[int, ...]) -> GlobalIndex:
    return GlobalIndex.whole(shape)


def _shared(index: GlobalIndex) -> GlobalIndex:
    """Return one index for all whole tensors of a shape, so that what is derived from it is kept once."""
    is_whole = index.fragment is None and index.positions is None and all(part is None for part in index.indices)
    return _whole(index.shape) if is_whole else index


def _as_real(index: GlobalIndex) -> GlobalIndex:
    """Return the index of a complex tensor's real view, in which each element of the last dim is two."""
    if "real" not in index.derived:
        shape = (*index.shape[:-1], 2 * index.shape[-1]) if index.shape else (2,)
        doubled = [indices if indices is None else _twice(indices) for indices in index.indices[-1:]] or [None]
        fragment = None if index.fragment is None else (2 * index.fragment[0], 2 * index.fragment[1])
        positions = None if index.positions is None else _twice(index.positions)
        index.derived["real"] = GlobalIndex(shape, (*index.indices[:-1], *doubled), fragment, positions)
    real: GlobalIndex = index.derived["real"]
    return real


def _twice(numbers: torch.Tensor) -> torch.Tensor:
    pairs = torch.stack([2 * numbers, 2 * numbers + 1], dim=-1)
    return pairs.where(numbers[:, None] != PADDING, PADDING).reshape(-1)


def _num_padding(index: GlobalIndex) -> int:
    if index.positions is None:
        return 0
    if "padding" not in index.derived:
        index.derived["padding"] = int((index.positions == PADDING).sum())
    padding: int = index.derived["padding"]
    return padding


def _require_shape(values: torch.Tensor, index: GlobalIndex) -> None:
    start, stop = index.present
    is_right = values.numel() == stop - start
    if index.fragment is None and index.positions is None:
        is_right = tuple(values.shape) == index.local_shape
    if not is_right:
        raise UsageError(
            "tensor", _text(values), f"the shape of its index: {index.local_shape}, {stop - start} elements"
        )


def is_host(device: torch.device) -> bool:
    """Return whether numbers may be looked at: on another device that waits until all before is done."""
    return device.type == "cpu"


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    is_enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_enabled else nullcontext()


def _product_dtype(values: torch.Tensor) -> torch.dtype:
    """Return the dtype of products. A matrix unit that rounds float32 to TF32 does not round what was bfloat16."""
    is_half = values.is_floating_point() and values.element_size() <= 2
    return torch.float32 if is_half and not is_host(values.device) else torch.float64


def _text(values: torch.Tensor) -> str:
    return str(tuple(values.shape))
