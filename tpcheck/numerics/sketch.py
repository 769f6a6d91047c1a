"""A tensor in four or eight kilobytes: signed sums of its tiles, which add up over the shards of any cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Shard

SIGN_SETS = 4
TILES = 16  # along the rows and along the columns


@dataclass(frozen=True, slots=True)
class GlobalIndex:
    """Which elements of a whole tensor a local one holds.

    Attributes:
        shape: Of the whole tensor.
        indices: For each dim, the global index of each local index, as int64; None for all of them, in order.
        fragment: The first and one past the last of the elements of the flattened local tensor that are present, where
            that is one part of a flat partition (ZeRO); None for all of them.
        positions: For a cut that is no product of dims: the flat global position of each present element, int64; -1
            for padding. `indices` are then not used.
    """

    shape: tuple[int, ...]
    indices: tuple[torch.Tensor | None, ...]
    fragment: tuple[int, int] | None = None
    positions: torch.Tensor | None = None

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> GlobalIndex:
        """Return the index of a tensor that is all there."""
        return cls(tuple(shape), (None,) * len(shape))

    @classmethod
    def shard(cls, shape: tuple[int, ...], placement: Shard, num_ranks: int, rank: int) -> GlobalIndex:
        """Return the index of one rank's shard of a tensor of this shape."""
        dim = placement.dim % len(shape)
        held = [index for block in placement.ranges(shape[dim], num_ranks, rank) for index in block]
        indices: list[torch.Tensor | None] = [None] * len(shape)
        indices[dim] = torch.tensor(held, dtype=torch.int64)
        return cls(tuple(shape), tuple(indices))

    @classmethod
    def from_layout(cls, layout: Layout, tp_rank: int) -> GlobalIndex:
        """Return the index of one rank's part of a parameter."""
        raise NotImplementedError

    def piece(self) -> str:
        """Return a short digest that is equal for two indices of the same elements, and for no others."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RowKeys:
    """Names of rows by content, so that a sum over rows is the same wherever and in whatever order they are.

    Attributes:
        keys: One int64 for each row.
        tiles: The tile of each row, int64 from 0 to TILES - 1.
    """

    keys: torch.Tensor
    tiles: torch.Tensor


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is kept of a tensor; sums, differences and multiples of sketches are those of the tensors.

    Attributes:
        tiles: (SIGN_SETS, TILES, TILES), float64 on the CPU: for each set of signs the signed sum of each tile.
        sum_squares: Of the finite elements. It adds up over shards, not over terms of a sum.
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
        raise NotImplementedError

    def __add__(self, other: Sketch) -> Sketch:
        raise NotImplementedError

    def __sub__(self, other: Sketch) -> Sketch:
        raise NotImplementedError

    def scaled(self, factor: float) -> Sketch:
        """Return the sketch of the tensor times `factor`."""
        raise NotImplementedError

    @property
    def norm(self) -> float:
        """Estimate of the tensor's Frobenius norm."""
        raise NotImplementedError

    def tile_norms(self) -> torch.Tensor:
        """Return the estimate of each tile's norm, (TILES, TILES)."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class PendingSketch:
    """A sketch that is still on its tensor's device."""

    packed: torch.Tensor
    numel: int

    def add(self, other: PendingSketch) -> PendingSketch:
        """Return the sum, on the device."""
        raise NotImplementedError


def sketch(
    tensor: torch.Tensor, index: GlobalIndex | None = None, *, rows: RowKeys | None = None, scale: float = 1.0
) -> Sketch:
    """Return the sketch of `scale` times a tensor."""
    raise NotImplementedError


def start_sketch(
    tensor: torch.Tensor, index: GlobalIndex | None = None, *, rows: RowKeys | None = None, scale: float = 1.0
) -> PendingSketch:
    """Compute a sketch on the tensor's device, without waiting for it."""
    raise NotImplementedError


def fetch_sketches(pending: Sequence[PendingSketch]) -> list[Sketch]:
    """Copy all sketches to the host at once, and wait for them."""
    raise NotImplementedError


def distance(actual: Sketch, expected: Sketch) -> float:
    """Estimate the Frobenius norm of the difference of two tensors."""
    raise NotImplementedError


def row_keys(samples: torch.Tensor, length: int) -> RowKeys:
    """Return the keys of the rows of a [B, length] tensor, row by row, for B samples with these keys."""
    raise NotImplementedError


def sample_keys(leaf: torch.Tensor) -> torch.Tensor:
    """Return a digest of each sample's content, int64 [B], of a tensor with batch dim; the same on every device."""
    raise NotImplementedError
