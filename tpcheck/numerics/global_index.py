"""Which elements of a whole tensor a local one holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import xxhash

from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Replicate, Shard

PADDING = -1


@dataclass(frozen=True, slots=True)
class GlobalIndex:
    """Which elements of a whole tensor a local one holds.

    Keep an index while its tensor is sketched again and again: what is derived from it is kept with it.

    Attributes:
        shape: Of the whole tensor.
        indices: For each dim, the global index of each local index, as int64; None for all of them, in order.
        fragment: The first and one past the last of the elements of the flattened local tensor that are present, where
            that is one part of a flat partition (ZeRO); None for all of them.
        positions: For a cut that is no product of dims: the flat global position of each present element, int64; -1
            for padding. `indices` and `fragment` are then not used.
    """

    shape: tuple[int, ...]
    indices: tuple[torch.Tensor | None, ...]
    fragment: tuple[int, int] | None = None
    positions: torch.Tensor | None = None
    derived: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> GlobalIndex:
        """Return the index of a tensor that is all there."""
        return cls(tuple(shape), (None,) * len(shape))

    @classmethod
    def shard(cls, shape: Sequence[int], placement: Shard, num_ranks: int, rank: int) -> GlobalIndex:
        """Return the index of one rank's shard of a tensor of this shape."""
        dim = placement.dim % len(shape)
        held = [index for block in placement.ranges(shape[dim], num_ranks, rank) for index in block]
        indices: list[torch.Tensor | None] = [None] * len(shape)
        indices[dim] = torch.tensor(held, dtype=torch.int64, device="cpu")
        return cls(tuple(shape), tuple(indices))

    @classmethod
    def from_layout(cls, layout: Layout, tp_rank: int) -> GlobalIndex:
        """Return the index of one rank's part of a parameter, padding included."""
        placement = layout.placement()
        if isinstance(placement, Replicate):
            return cls.whole(layout.shape)
        if isinstance(placement, Shard):
            return cls.shard(layout.shape, placement, len(layout.local_shapes), tp_rank)
        assert layout.source is not None
        sizes = [prod(shape) for shape in layout.local_shapes]
        local = layout.source.cpu() - sum(sizes[:tp_rank])
        on_rank = (local >= 0) & (local < sizes[tp_rank])
        positions = torch.full((sizes[tp_rank],), PADDING, dtype=torch.int64, device="cpu")
        positions[local[on_rank]] = on_rank.nonzero().squeeze(1)
        return cls(layout.shape, (None,) * len(layout.shape), positions=positions)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The local tensor's shape before any flat partition; of `positions`, one dim."""
        if self.positions is not None:
            return (self.positions.numel(),)
        return tuple(
            size if indices is None else indices.numel() for size, indices in zip(self.shape, self.indices, strict=True)
        )

    @property
    def present(self) -> tuple[int, int]:
        """The first and one past the last of the elements of the flattened local tensor that are present."""
        if self.fragment is not None and self.positions is None:
            return self.fragment
        return (0, prod(self.local_shape))

    def positions_of(self, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the flat global positions of these elements of the flattened local tensor; -1 for padding."""
        if self.positions is not None:
            return self.positions[start:stop].to(device)
        remaining = torch.arange(start, stop, dtype=torch.int64, device=device)
        positions = torch.zeros_like(remaining)
        stride = 1
        local_sizes = self.local_shape
        for size, local_size, indices in zip(self.shape[::-1], local_sizes[::-1], self.indices[::-1], strict=True):
            local = remaining % max(local_size, 1)
            positions += stride * (local if indices is None else indices.to(device)[local])
            remaining = remaining // max(local_size, 1)
            stride *= size
        return positions

    def piece(self) -> str:
        """Return a short digest that is equal for two indices of the same elements, and for no others.

        It depends neither on the order of the elements nor on how they are described.
        """
        if "piece" not in self.derived:
            hasher = xxhash.xxh3_64()
            for part in (self.shape, *_canonical(self)):
                is_tensor = isinstance(part, torch.Tensor)
                hasher.update((f"{len(part)} numbers" if is_tensor else repr(part)).encode())
                if is_tensor:
                    hasher.update(part.numpy().data)
            self.derived["piece"] = hasher.hexdigest()
        piece: str = self.derived["piece"]
        return piece


def _canonical(index: GlobalIndex) -> tuple[Any, ...]:
    """Return the first of these that fits: a range of flat positions, the indices of each dim, all positions."""
    start, stop = index.present
    if index.positions is None and (stop - start == prod(index.local_shape) or start == stop):
        chosen: list[torch.Tensor | None] = [
            indices if indices is None else torch.unique(indices.cpu()) for indices in index.indices
        ]
        return _canonical_product(index.shape, chosen, is_empty=start == stop)
    if index.positions is None and index.local_shape == index.shape and all(part is None for part in index.indices):
        return ("range", start, stop)
    positions = torch.unique(index.positions_of(start, stop))
    positions = positions[positions != PADDING]
    if not len(positions):
        return ("range", 0, 0)
    by_dim = [torch.unique(part) for part in torch.unravel_index(positions, index.shape)]
    if prod(map(len, by_dim)) == len(positions):
        return _canonical_product(index.shape, list(by_dim), is_empty=False)
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions):
        return ("range", first, last + 1)
    return ("positions", positions)


def _canonical_product(
    shape: tuple[int, ...], chosen: Sequence[torch.Tensor | None], *, is_empty: bool
) -> tuple[Any, ...]:
    counts = [size if part is None else len(part) for size, part in zip(shape, chosen, strict=True)]
    if is_empty or not prod(counts):
        return ("range", 0, 0)
    first = last = 0
    for size, part in zip(shape, chosen, strict=True):
        first = first * size + (0 if part is None else int(part[0]))
        last = last * size + (size - 1 if part is None else int(part[-1]))
    if last - first + 1 == prod(counts):
        return ("range", first, last + 1)
    full = [part is None or len(part) == size for size, part in zip(shape, chosen, strict=True)]
    return tuple("all" if is_full else part for is_full, part in zip(full, chosen, strict=True))
