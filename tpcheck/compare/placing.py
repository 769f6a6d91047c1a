"""Reads off their shapes how the ranks' parts of an activation make up the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpcheck.placement import Placement, Replicate, Shard


@dataclass(frozen=True, slots=True)
class Placed:
    """Each rank's part of a tensor, with the placement that relates it to the whole."""

    placement: Placement
    parts: tuple[torch.Tensor, ...]

    @property
    def is_replicated(self) -> bool:
        """Whether every rank should hold the whole tensor."""
        return isinstance(self.placement, Replicate)

    @property
    def num_blocks(self) -> int:
        """How many blocks the whole is cut in, each for itself."""
        return len(self.placement.sizes) if isinstance(self.placement, Shard) else 1

    @property
    def is_fused(self) -> bool:
        """Whether the whole is cut block by block, so that its parts agree in one reading order alone."""
        return self.num_blocks > 1

    def expected_part(self, whole: torch.Tensor, tp_rank: int) -> torch.Tensor:
        """Return what `tp_rank` should hold of `whole`."""
        if not isinstance(self.placement, Shard):
            return whole
        dim = self.placement.dim
        ranges = self.placement.ranges(whole.shape[dim], len(self.parts), tp_rank)
        return torch.cat([whole.narrow(dim, indices.start, len(indices)) for indices in ranges], dim=dim)


def place(whole_shape: Sequence[int], parts: Sequence[torch.Tensor], hint: Placement | None = None) -> Placed | None:
    """Return the placement that the parts have, or None where their shapes do not make up the whole.

    Args:
        whole_shape: Shape of the expected tensor.
        parts: Each rank's tensor, by tp_rank.
        hint: Placement of the output features of the module's weight, followed where the shapes bear it out: blocks
            cannot be told from shapes.
    """
    shapes = [tuple(part.shape) for part in parts]
    whole = tuple(whole_shape)
    if all(shape == whole for shape in shapes):
        return Placed(Replicate(), tuple(parts))
    cut = [dim for dim in range(len(whole)) if any(len(s) != len(whole) or s[dim] != whole[dim] for s in shapes)]
    if len(cut) != 1 or any(len(shape) != len(whole) for shape in shapes):
        return None
    dim = cut[0]
    sizes = tuple(shape[dim] for shape in shapes)
    if isinstance(hint, Shard) and dim == len(whole) - 1 and _total_sizes(hint) == sizes:
        return Placed(Shard(dim, hint.blocks, hint.sizes), tuple(parts))
    if sum(sizes) != whole[dim]:
        return None
    return Placed(Shard(dim, sizes=(sizes,)), tuple(parts))


def _total_sizes(shard: Shard) -> tuple[int, ...]:
    return tuple(sum(by_block) for by_block in zip(*shard.sizes, strict=True))
