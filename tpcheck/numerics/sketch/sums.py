"""The signed sums of tiles of a matrix or of single elements, as thin products along its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from tpcheck.core.digests import BlockDigest
from tpcheck.core.errors import UsageError
from tpcheck.numerics.global_index import PADDING, GlobalIndex
from tpcheck.numerics.sketch.axes import (
    CHUNK_ROWS,
    FEW_ROWS,
    PATTERNS,
    Axis,
    Chunks,
    axes_of,
    batches,
    flat_columns,
    keyed_axis,
    tile_of_run,
)
from tpcheck.numerics.sketch.indices import num_padding, shared, text_of_shape, whole_index
from tpcheck.numerics.sketch.row_keys import RowKeys
from tpcheck.numerics.sketch.signs import SIGN_SETS, TILES, signs_of_elements
from tpcheck.numerics.sketch.store import NUM_SUMS, is_host, new_row

_ALL_TILES = tuple(range(TILES))
# Elements that are converted at once: 1 MiB of float64 stays in a core's cache, where twice as much takes a third more
# time on busy cores, and half as much more calls; a device wants few, large kernels.
_BLOCK, _DEVICE_BLOCK = 1 << 17, 1 << 24
_CHUNK = 1 << 16  # elements whose signs are hashed one by one: bounds what is kept for a vector to 5 MiB
_SUMMED_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32_BLOCK = 1 << 18  # elements: 1 MiB, as _BLOCK
_WIDEST = 1 << 14  # columns at once: bounds what a vocabulary needs to 12 MiB
# Measured on 262144 numbers that are all equal, whose roundings add up: 1 u and 30 us; of 384 at a time 7 u and 27 us.
_SQUARES = 128
# Of a mean square in float32: what underflows in it is below 2^-149 an element.
_LEAST_SQUARE = 2.0**-119
FLOAT32_ROUNDING = math.sqrt((max(CHUNK_ROWS, FEW_ROWS + PATTERNS**2) / PATTERNS + 1) / 6) * 2.0**-24
"""Rounding of a sketch that is summed in float32, relative to the norm: derived in `sketches.py`."""
_SMALL = 1 << 16  # elements: below, one product over all rows costs less than sixteen (measured: 0.15 against 0.3 ms)


class Sums:
    """The sums of one sketch while they are computed, on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, digest: BlockDigest | None = None) -> None:
        self.device = device
        self.digest = digest
        self.dtype = dtype  # of products
        self.block = _BLOCK if is_host(device) else _DEVICE_BLOCK
        self.row = new_row(device)
        self.tiles = self.row[0][self.row[1], :NUM_SUMS].view(SIGN_SETS, TILES, TILES)
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
            packed[NUM_SUMS] = self.sum_squares
            packed[NUM_SUMS + 1] = self.nonfinite
        else:
            counts = [self.sum_squares, self.nonfinite]
            tail = [torch.as_tensor(count, dtype=torch.float64, device=self.device) for count in counts]
            torch.stack(tail, out=packed[NUM_SUMS:])
        if scale != 1.0:
            packed[:NUM_SUMS] *= scale
            packed[NUM_SUMS] *= scale**2
        return self.row


def product_dtype(values: torch.Tensor) -> torch.dtype:
    """Return the dtype of products. A matrix unit that rounds float32 to TF32 does not round what was bfloat16."""
    is_half = values.is_floating_point() and values.element_size() <= 2
    return torch.float32 if is_half and not is_host(values.device) else torch.float64


def add_matrix(sums: Sums, values: torch.Tensor, index: GlobalIndex) -> None:
    """Add a product of dims, or one flat part of it: up to three matrices, of which two are parts of one row."""
    rows, columns = axes_of(index, sums.device)
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
    start: int, stop: int, width: int, rows: Axis, columns: Axis
) -> Iterator[tuple[int, int, Axis, Axis]]:
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


def add_keyed_rows(sums: Sums, values: torch.Tensor, index: GlobalIndex | None, rows: RowKeys) -> None:
    """Add a tensor whose leading dims are rows with keys."""
    depth = next((dim for dim in range(values.dim() + 1) if prod(values.shape[:dim]) == len(rows.keys)), None)
    if index is not None:
        depth = values.dim() - len(index.local_shape)
    if depth is None or depth < 0 or prod(values.shape[:depth]) != len(rows.keys):
        raise UsageError(
            "rows", f"{len(rows.keys)} keys", f"one for each row of a tensor of shape {text_of_shape(values)}"
        )
    index = shared(index) if index is not None else whole_index(tuple(values.shape[depth:]) or (1,))
    width = prod(index.local_shape)
    if index.fragment is not None or num_padding(index) or width * len(rows.keys) != values.numel():
        raise UsageError(
            "index", index.local_shape, f"the dims beyond the rows of a tensor of shape {text_of_shape(values)}"
        )
    if not values.numel():
        return
    _add_block(sums, values.reshape(-1, width), keyed_axis(rows, sums.device), flat_columns(index, sums.device))


def _add_block(sums: Sums, matrix: torch.Tensor, rows: Axis, columns: Axis) -> None:
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
    matrix: torch.Tensor, rows: Axis, columns: Axis, digest: BlockDigest | None
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
    for chunks in rows.chunks(max(FEW_ROWS // 2, _FLOAT32_BLOCK // width)):
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

    def add(self, by_pattern: torch.Tensor, chunks: Chunks) -> None:
        """Add the sums of a block: (chunks * PATTERNS, width), float32."""
        per_tile, first, last = chunks.per_tile or 1, chunks.first, chunks.last
        by_chunk = by_pattern.view(-1, per_tile * PATTERNS, by_pattern.shape[1]).to(chunks.dtype)
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
    """Return the signs (SIGN_SETS, number * PATTERNS) of the patterns of some chunks, relative to the first sign."""
    numbers = torch.arange(PATTERNS, device="cpu")
    others = [1.0 - 2.0 * ((numbers >> sign_set) & 1) for sign_set in range(SIGN_SETS - 1)]
    return torch.stack([torch.ones(PATTERNS, device="cpu"), *others]).to(dtype).repeat(1, number)


def _rows_first(sums: Sums, matrix: torch.Tensor, rows: Axis, columns: Axis) -> torch.Tensor:
    width = matrix.shape[1]
    is_sorted = tuple(tile for tile, _, _ in rows.runs) == _ALL_TILES  # one run a tile: its first product is its sum
    allocate = torch.empty if is_sorted else torch.zeros
    by_tile = allocate(TILES, SIGN_SETS, width, dtype=torch.float64, device=sums.device)
    started = 0
    for tiles, start, stop in batches(rows.runs, max(1, sums.block // width)):
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


def _column_sums(by_tile: torch.Tensor, columns: Axis) -> torch.Tensor:
    """Return the signed sums of the columns: (SIGN_SETS, n, TILES) of (n, SIGN_SETS, width), perhaps overwritten."""
    num_tiles, signs = len(by_tile), columns.cut_signs()
    if signs is not None:
        cut = by_tile.view(num_tiles, len(signs), -1).transpose(0, 1)
        by_run = torch.bmm(cut, signs).view(SIGN_SETS, len(columns.runs), num_tiles).transpose(1, 2)
        tiles = tuple(tile for tile, _, _ in columns.runs)
        return by_run if tiles == _ALL_TILES else by_run @ tile_of_run(tiles, by_tile.device)
    by_tile *= columns.signs
    tiles_sums = torch.zeros(SIGN_SETS, num_tiles, TILES, dtype=torch.float64, device=by_tile.device)
    for tile, start, stop in columns.runs:
        tiles_sums[:, :, tile] += by_tile[:, :, start:stop].sum(-1).T
    return tiles_sums


def _columns_first(sums: Sums, matrix: torch.Tensor, rows: Axis, columns: Axis) -> torch.Tensor:
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
    return by_run @ tile_of_run(column_tiles, sums.device)


def add_elements(sums: Sums, flat: torch.Tensor, index: GlobalIndex) -> None:
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
    signs, tiles = signs_of_elements(positions, index.shape)
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
