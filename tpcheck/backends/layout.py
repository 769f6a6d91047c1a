"""Where each element of a full tensor lies on the ranks of a TP group, to the element."""

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
            tp_rank. None where every rank holds the whole tensor.
    """

    shape: tuple[int, ...]
    local_shapes: tuple[tuple[int, ...], ...]
    source: torch.Tensor | None = None

    @classmethod
    def replicated(cls, shape: Sequence[int], tp: int) -> Layout:
        return cls(tuple(shape), (tuple(shape),) * tp)

    @classmethod
    def placed(cls, shape: Sequence[int], placement: Shard | Replicate, tp: int) -> Layout:
        """Return the layout of a tensor that is cut so, or whole on every rank.

        Raises:
            UsageError: The blocks or sizes do not add up to the dim.
        """
        if isinstance(placement, Replicate):
            return cls.replicated(shape, tp)
        ids = torch.arange(prod(shape)).reshape(tuple(shape))
        dim = placement.dim % ids.dim()
        parts = []
        for tp_rank in range(tp):
            held = [index for indices in placement.ranges(ids.shape[dim], tp, tp_rank) for index in indices]
            parts.append(ids.index_select(dim, torch.tensor(held, dtype=torch.int64)))
        source = torch.empty(prod(shape), dtype=torch.int64)
        source[torch.cat([part.reshape(-1) for part in parts])] = torch.arange(prod(shape))
        return cls(tuple(shape), tuple(tuple(part.shape) for part in parts), source)

    @property
    def is_replicated(self) -> bool:
        return self.source is None

    def assemble(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the full tensor from one shard of each rank; the first rank's own where it is replicated."""
        if self.source is None:
            return shards[0]
        pool = torch.cat([shard.reshape(-1) for shard in shards])
        return pool[self.source.to(pool.device)].reshape(self.shape)

    def local(self, full: torch.Tensor, tp_rank: int) -> torch.Tensor:
        """Return what `tp_rank` holds of `full`; elements that no part of the full tensor comes from are zero."""
        if self.source is None:
            return full
        sizes = [prod(shape) for shape in self.local_shapes]
        pool = full.new_zeros(sum(sizes))
        pool[self.source.to(full.device)] = full.reshape(-1)
        start = sum(sizes[:tp_rank])
        return pool[start : start + sizes[tp_rank]].reshape(self.local_shapes[tp_rank])

    def placement(self) -> Placement | None:
        """Return this layout in the words of `placement`, or None where it is not a cut of one dim into blocks."""
        if self.source is None:
            return Replicate()
        if any(len(local) != len(self.shape) for local in self.local_shapes):
            return None
        cut = [dim for dim, sizes in enumerate(zip(self.shape, *self.local_shapes, strict=True)) if len(set(sizes)) > 1]
        if len(cut) != 1:
            return None
        shard = _blocks_of(self._owners(cut[0]), cut[0], len(self.local_shapes))
        return shard if shard and self._is(shard) else None

    def _owners(self, dim: int) -> list[int]:
        """Return which tp_rank holds each index of `dim`, judged by the first element of that index."""
        assert self.source is not None
        ends = torch.tensor([prod(shape) for shape in self.local_shapes]).cumsum(0)
        ranks = torch.bucketize(self.source, ends, right=True).reshape(self.shape)
        owners: list[int] = ranks.movedim(dim, 0).reshape(self.shape[dim], -1)[:, 0].tolist()
        return owners

    def _is(self, shard: Shard) -> bool:
        assert self.source is not None
        made = Layout.placed(self.shape, shard, len(self.local_shapes))
        assert made.source is not None
        return made.local_shapes == self.local_shapes and torch.equal(made.source, self.source.cpu())


def _blocks_of(owners: list[int], dim: int, num_ranks: int) -> Shard | None:
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
