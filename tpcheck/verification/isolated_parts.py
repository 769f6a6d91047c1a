"""Which part of the reference's tensors a module of the sharded model is fed, where that can be told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tpcheck.collect.local import own_part
from tpcheck.compare import distance_of_terms, frobenius, frobenius_distance
from tpcheck.records import TensorKey

Activations = Mapping[TensorKey, torch.Tensor]

# A tensor that is further than this from what should be there, relative to it, is wrong by more than a small mistake,
# or cut in a way that its shape does not tell: the module keeps it. Gradients are of fused blocks, too, most of which
# may lie where an uneven reading has them.
_ALIKE = {"forward": 0.5, "backward": 0.2}
# Closer than this is rounding, of one module at a time; a term of a sum is further off, if only in some features.
_ROUNDED = 0.05


@dataclass(frozen=True, slots=True)
class Parts:
    """One rank's parts of the reference's tensors.

    Attributes:
        expected: The reference's tensors.
        terms: Gradients of which each rank has a term, which no part can stand for; None where nobody knows which.
    """

    expected: Activations
    tp: int = 1
    tp_rank: int = 0
    terms: Collection[TensorKey] | None = ()

    def instead_of(self, key: TensorKey, actual: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of what should be there; what is there where no part of it is alike.

        The reference's only call of a module stands for a second one, too: activation checkpointing computes it again.
        """
        whole = self.expected.get(key, self.expected.get(replace(key, call=0)) if key.call == 1 else None)
        if whole is None or any(placement.is_partial() for placement in getattr(actual, "placements", ())):
            return actual
        own = own_part(actual)
        part = _part(whole, tuple(own.shape), self.tp, self.tp_rank)
        if part is None or not frobenius_distance(own, part) <= self._alike(key) * frobenius(part):
            return actual
        return _filled_like(actual, part)

    def _alike(self, key: TensorKey) -> float:
        if key.phase == "backward" and self.terms is None:
            return _ROUNDED
        return 0.0 if self.terms is not None and key in self.terms else _ALIKE[key.phase]


def terms_among(passes: Sequence[Activations], expected: Activations) -> frozenset[TensorKey]:
    """Return the gradients of outputs of which each rank has a term: they add up to what none of them is.

    Args:
        passes: What each rank recorded where modules kept every gradient that is further off than rounding.
    """
    return frozenset(
        key
        for key, whole in expected.items()
        if key.phase == "backward" and key.role == "output" and _are_terms([one.get(key) for one in passes], whole)
    )


def _are_terms(parts: Sequence[torch.Tensor | None], whole: torch.Tensor) -> bool:
    known = [part for part in parts if part is not None and part.shape == whole.shape]
    if len(known) < max(2, len(parts)):
        return False
    as_whole = max(frobenius_distance(part, whole) for part in known)
    return as_whole > _ROUNDED * frobenius(whole) and distance_of_terms(known, whole) < as_whole / 2


def _part(whole: torch.Tensor, shape: tuple[int, ...], tp: int, tp_rank: int) -> torch.Tensor | None:
    """Return the whole, or its even cut along the one dim in which the shapes differ; None for anything else."""
    if tuple(whole.shape) == shape:
        return whole
    cut = [dim for dim, size in enumerate(shape) if size != whole.shape[dim]] if len(shape) == whole.dim() else []
    if len(cut) != 1 or shape[cut[0]] * tp != whole.shape[cut[0]]:
        return None
    return whole.narrow(cut[0], tp_rank * shape[cut[0]], shape[cut[0]])


def _filled_like(actual: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the kind of `actual`, a DTensor, too, that holds `part` on this rank."""
    filled = actual.detach().clone()
    own_part(filled).copy_(part)
    return filled
