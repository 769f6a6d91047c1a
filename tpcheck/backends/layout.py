"""Which elements of a parameter each TP rank holds, element by element: where every backend's placements end up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch

from tpcheck.core.placement import Placement, Replicate, Shard


@dataclass(frozen=True, slots=True)
class Layout:
    """An exact map between a full tensor and its shards; no formula is assumed.

    Attributes:
        shape: Shape of the full tensor.
        local_shapes: Shape of each rank's shard, by tp_rank.
        source: For each element of the full tensor (flat), its position in the concatenation of all flat shards by
            tp_rank. None where every rank holds the full tensor.
    """

    shape: tuple[int, ...]
    local_shapes: tuple[tuple[int, ...], ...]
    source: torch.Tensor | None = None

    @classmethod
    def replicated(cls, shape: Sequence[int], tp: int) -> Layout:
        return cls(tuple(shape), (tuple(shape),) * tp)

    @classmethod
    def from_positions(cls, shape: Sequence[int], shards: Sequence[torch.Tensor]) -> Layout:
        """Return the layout of shards whose values are the flat positions of their elements in the full tensor.

        Args:
            shape: Shape of the full tensor.
            shards: Integers, of each rank's local shape, by tp_rank. A rank may hold nothing.
        """
        positions = torch.cat([shard.reshape(-1) for shard in shards])
        source = torch.zeros(prod(shape), dtype=torch.int64)
        source[positions] = torch.arange(len(positions))
        return cls(tuple(shape), tuple(tuple(shard.shape) for shard in shards), source)

    @classmethod
    def from_placement(cls, shape: Sequence[int], placement: Shard | Replicate, tp: int) -> Layout:
        """Return the layout of a tensor with this placement.

        Raises:
            UsageError: The blocks or sizes do not add up to the dim.
        """
        if isinstance(placement, Replicate):
            return cls.replicated(shape, tp)
        positions = torch.arange(prod(shape)).reshape(tuple(shape))
        dim = placement.dim % positions.dim()
        shards = []
        for tp_rank in range(tp):
            indices = [index for block in placement.ranges(positions.shape[dim], tp, tp_rank) for index in block]
            shards.append(positions.index_select(dim, torch.tensor(indices, dtype=torch.int64)))
        return cls.from_positions(shape, shards)

    placed = from_placement  # its name in version 0.1, which backends of third parties use

    @property
    def is_replicated(self) -> bool:
        return self.source is None

    def assemble(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the full tensor from the shards of all ranks; the first rank's copy where it is replicated."""
        if self.source is None:
            return shards[0]
        elements = torch.cat([shard.reshape(-1) for shard in shards])
        return elements[self.source.to(elements.device)].reshape(self.shape)

    def local(self, full: torch.Tensor, tp_rank: int) -> torch.Tensor:
        """Return the shard of `full` on `tp_rank`. Its padding, elements that are not in the full tensor, is zero."""
        if self.source is None:
            return full
        sizes = [prod(shape) for shape in self.local_shapes]
        elements = full.new_zeros(sum(sizes))
        elements[self.source.to(full.device)] = full.reshape(-1)
        start = sum(sizes[:tp_rank])
        return elements[start : start + sizes[tp_rank]].reshape(self.local_shapes[tp_rank])

    def parts(self, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the shard of `full` on every rank, by tp_rank."""
        return tuple(self.local(full, tp_rank) for tp_rank in range(len(self.local_shapes)))

    def placement(self) -> Placement | None:
        """Return this layout as a placement, or None where it does not cut one dim into blocks."""
        if self.source is None:
            return Replicate()
        if any(len(local) != len(self.shape) for local in self.local_shapes):
            return None
        cut = [dim for dim, sizes in enumerate(zip(self.shape, *self.local_shapes, strict=True)) if len(set(sizes)) > 1]
        if len(cut) != 1:
            return None
        shard = _blocks_of(self._owners(cut[0]), cut[0], len(self.local_shapes))
        return shard if self._has_placement(shard) else None

    def _owners(self, dim: int) -> list[int]:
        """Return the tp_rank that holds each index of `dim`, judged by the first element of that index."""
        assert self.source is not None
        ends = torch.tensor([prod(shape) for shape in self.local_shapes]).cumsum(0)
        ranks = torch.bucketize(self.source, ends, right=True).reshape(self.shape)
        owners: list[int] = ranks.movedim(dim, 0).reshape(self.shape[dim], -1)[:, 0].tolist()
        return owners

    def _has_placement(self, shard: Shard) -> bool:
        assert self.source is not None
        layout = Layout.from_placement(self.shape, shard, len(self.local_shapes))
        assert layout.source is not None
        return layout.local_shapes == self.local_shapes and torch.equal(layout.source, self.source.cpu())


def _blocks_of(owners: list[int], dim: int, num_ranks: int) -> Shard:
    """Read blocks off a run of owners such as 0 0 1 1 0 1: a new block starts where the rank falls back."""
    blocks: list[list[int]] = []
    last = num_ranks
    for rank, run in groupby(owners):
        if rank <= last:
            blocks.append([0] * num_ranks)
        blocks[-1][rank] = len(list(run))
        last = rank
    sizes = tuple(tuple(block) for block in blocks)
    return Shard(dim, blocks=tuple(sum(block) for block in blocks) if len(blocks) > 1 else 1, sizes=sizes)
