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
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tpcheck.core.digests import BlockDigest
from tpcheck.numerics.global_index import GlobalIndex
from tpcheck.numerics.sketch.indices import as_real, num_padding, require_shape, shared, whole_index
from tpcheck.numerics.sketch.row_keys import RowKeys
from tpcheck.numerics.sketch.signs import SIGN_SETS, TILES
from tpcheck.numerics.sketch.store import NUM_SUMS, is_host, new_row
from tpcheck.numerics.sketch.sums import Sums, add_elements, add_keyed_rows, add_matrix, product_dtype


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
        block, row = new_row(self.block.device)
        with torch.no_grad():
            torch.add(self.packed, other.packed, out=block[row])
        return PendingSketch(block, row, self.numel + other.numel)


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
        numel = values.numel() - (0 if index is None else num_padding(index))
        if values.is_complex():
            values = torch.view_as_real(values.resolve_conj())
            if rows is None or index is not None:
                values = values.flatten(-2 if values.dim() > 1 else 0)
            index = None if index is None else as_real(index)
        sums = Sums(values.device, product_dtype(values), digest)
        if rows is not None:
            add_keyed_rows(sums, values, index, rows)
        else:
            index = shared(index) if index is not None else whole_index(tuple(values.shape))
            require_shape(values, index)
            if index.positions is None and len(index.shape) > 1:
                add_matrix(sums, values, index)
            else:
                add_elements(sums, values.reshape(-1), index)
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
        counts = [row[NUM_SUMS:].tolist() for row in rows]
    else:
        packed = _to_host(torch.stack([sketch.packed for sketch in pending]))
        rows, counts = [*packed], packed[:, NUM_SUMS:].tolist()
    return [
        Sketch(row[:NUM_SUMS].view(SIGN_SETS, TILES, TILES), sum_squares, started.numel, int(nonfinite))
        for row, (sum_squares, nonfinite), started in zip(rows, counts, pending, strict=True)
    ]


def _to_host(packed: torch.Tensor) -> torch.Tensor:
    if not packed.is_cuda:
        return packed.cpu()
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return host


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    is_enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_enabled else nullcontext()
