"""The placement of a tensor over the ranks of one mesh axis. Integers only; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from tpcheck.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank has the full tensor."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank has a term; the tensor is their sum."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank has a part of every block of `dim`.

    Attributes:
        dim: The dim that is cut. Negative dims count from the end.
        blocks: Fused blocks that are cut one by one (Q, K and V; gate and up): how many equal ones, or their sizes.
        sizes: For each block, the size of each rank's part, where these are not the ceil-sized chunks of torch.chunk
            (such as cuts on KV-head boundaries).

    Example:
        >>> [list(indices) for indices in Shard(0, blocks=2).ranges(8, num_ranks=2, rank=1)]
        [[2, 3], [6, 7]]
        >>> Shard(0, sizes=((4, 2),)).local_size(6, num_ranks=2, rank=0)
        4
    """

    dim: int
    blocks: int | tuple[int, ...] = 1
    sizes: tuple[tuple[int, ...], ...] = ()

    def ranges(self, dim_size: int, num_ranks: int, rank: int) -> Iterator[range]:
        """Yield the indices of `dim` that are on `rank`, one range per block.

        Chunks are ceil-sized as in torch.chunk, so trailing ranks may have none.

        Raises:
            UsageError: The blocks or sizes do not add up to `dim_size`, or `rank` is not one of `num_ranks`.
        """
        if num_ranks < 1:
            raise UsageError("num_ranks", num_ranks, "a positive integer")
        if not 0 <= rank < num_ranks:
            raise UsageError("rank", rank, f"an integer from 0 to {num_ranks - 1}")
        block_sizes = self.block_sizes(dim_size)
        if self.sizes and len(self.sizes) != len(block_sizes):
            raise UsageError("sizes", self.sizes, f"one tuple for each of {len(block_sizes)} blocks")
        block_starts = accumulate(block_sizes, initial=0)
        chunked = [self._chunks(block, size, num_ranks) for block, size in enumerate(block_sizes)]
        for start, chunks in zip(block_starts, chunked, strict=False):  # one start more than blocks
            first = start + sum(chunks[:rank])
            yield range(first, first + chunks[rank])

    def local_size(self, dim_size: int, num_ranks: int, rank: int) -> int:
        """Return how many indices of `dim` are on `rank`, over all blocks."""
        return sum(len(indices) for indices in self.ranges(dim_size, num_ranks, rank))

    def block_sizes(self, dim_size: int) -> tuple[int, ...]:
        """Return the size of each block of a dim of `dim_size`."""
        if dim_size < 0:
            raise UsageError("dim_size", dim_size, "a size, 0 or more")
        if isinstance(self.blocks, tuple):
            if sum(self.blocks) != dim_size or min(self.blocks, default=0) < 0:
                raise UsageError("blocks", self.blocks, f"sizes that add up to {dim_size}")
            return self.blocks
        if self.blocks < 1 or dim_size % self.blocks:
            raise UsageError("blocks", self.blocks, f"a divisor of {dim_size}")
        return (dim_size // self.blocks,) * self.blocks

    def _chunks(self, block: int, block_size: int, num_ranks: int) -> tuple[int, ...]:
        if not self.sizes:
            chunk = -(-block_size // num_ranks)
            return tuple(max(0, min(chunk, block_size - rank * chunk)) for rank in range(num_ranks))
        chunks = self.sizes[block]
        if len(chunks) != num_ranks or sum(chunks) != block_size or min(chunks) < 0:
            raise UsageError("sizes", self.sizes, f"{num_ranks} sizes that add up to {block_size} in block {block}")
        return chunks


Placement: TypeAlias = Shard | Replicate | Partial


def ranks_of_cut(shard: tuple[int, ...], whole: tuple[int, ...]) -> int | None:
    """Return over how many ranks one dim is cut, or None where this is not the shape of a shard.

    Example:
        >>> ranks_of_cut((4, 3), (4, 6)), ranks_of_cut((4, 4), (4, 6))
        (2, None)
    """
    cut = [(own, size) for own, size in zip(shard, whole, strict=False) if own != size]
    if len(shard) != len(whole) or len(cut) != 1 or not cut[0][0] or cut[0][1] % cut[0][0]:
        return None
    return cut[0][1] // cut[0][0]
