"""How an activation lies over the ranks: by the shapes on the ranks, its module's weight, or its samples.

A second guess is `_with_other_placement` in `checks/activations.py`: it needs the comparison of the module around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tpcheck.core.placement import Placement, Replicate, Shard
from tpcheck.numerics.evidence import Evidence, TensorKey


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """Each rank's part of a tensor, with the placement that relates it to the full tensor."""

    placement: Placement
    parts: tuple[torch.Tensor, ...]

    @property
    def is_replicated(self) -> bool:
        """Whether every rank should hold the full tensor."""
        return isinstance(self.placement, Replicate)

    @property
    def num_blocks(self) -> int:
        """How many blocks the full tensor has, each of which is cut."""
        return len(self.placement.sizes) if isinstance(self.placement, Shard) else 1

    @property
    def is_fused(self) -> bool:
        """Whether it is cut block by block: the parts, concatenated in the order of ranks, are not the full tensor."""
        return self.num_blocks > 1

    def expected_part(self, full_tensor: torch.Tensor, tp_rank: int) -> torch.Tensor:
        """Return what `tp_rank` should hold of `full_tensor`."""
        if not isinstance(self.placement, Shard):
            return full_tensor
        dim = self.placement.dim
        ranges = self.placement.ranges(full_tensor.shape[dim], len(self.parts), tp_rank)
        return torch.cat([full_tensor.narrow(dim, indices.start, len(indices)) for indices in ranges], dim=dim)

    def expected_parts(self, full_tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what every rank should hold of `full_tensor`, by tp_rank."""
        return tuple(self.expected_part(full_tensor, tp_rank) for tp_rank in range(len(self.parts)))


def infer_placement(
    full_shape: Sequence[int], parts: Sequence[torch.Tensor], hint: Placement | None = None
) -> PlacedTensor | None:
    """Return the parts with the placement that their shapes show; None where they do not make up the full tensor.

    Args:
        full_shape: Shape of the expected tensor.
        parts: Each rank's tensor, by tp_rank.
        hint: Placement of the features in the module's weight: shapes do not show blocks. Ignored where the shapes do
            not fit it.
    """
    shapes = [tuple(part.shape) for part in parts]
    full = tuple(full_shape)
    if all(shape == full for shape in shapes):
        return PlacedTensor(Replicate(), tuple(parts))
    cut = [dim for dim in range(len(full)) if any(len(s) != len(full) or s[dim] != full[dim] for s in shapes)]
    if len(cut) != 1 or any(len(shape) != len(full) for shape in shapes):
        return None
    dim = cut[0]
    sizes = tuple(shape[dim] for shape in shapes)
    if isinstance(hint, Shard) and dim == len(full) - 1 and tuple(map(sum, zip(*hint.sizes, strict=True))) == sizes:
        return PlacedTensor(Shard(dim, hint.blocks, hint.sizes), tuple(parts))
    if sum(sizes) != full[dim]:
        return None
    return PlacedTensor(Shard(dim, sizes=(sizes,)), tuple(parts))


def placement_of_features(evidence: Evidence, key: TensorKey) -> Placement | None:
    """Return how the module's weight, [out, in], cuts the features of this activation."""
    layout = evidence.layouts.get(f"{key.module}.weight")
    placement = layout.placement() if layout is not None else None
    features = 0 if key.role == "output" else 1
    return placement if isinstance(placement, Shard) and placement.dim == features else None


def cut_by_sample(placed: PlacedTensor, expected: torch.Tensor, batch_size: int) -> Iterator[PlacedTensor]:
    """Yield the parts as heads of each sample, where dim 0 is samples times heads and is cut.

    See `families.special_cases.ALIBI_HEADS_WITHIN_SAMPLES`.
    """
    shard, tp = placed.placement, len(placed.parts)
    if not isinstance(shard, Shard) or shard.dim != 0 or batch_size < 2 or len(expected) % batch_size:
        return
    sizes = tuple(len(part) // batch_size for part in placed.parts)
    if (
        all(len(part) % batch_size == 0 for part in placed.parts)
        and sum(sizes) * batch_size == len(expected)
        and tp > 1
    ):
        yield PlacedTensor(Shard(0, blocks=(sum(sizes),) * batch_size, sizes=(sizes,) * batch_size), placed.parts)
