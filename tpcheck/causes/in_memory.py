"""Tensors in memory, as the stories of checkpoints read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tpcheck.causes.checkpoint import Case, Story, Surroundings, explain_tensor
from tpcheck.compare.bits import BitComparer
from tpcheck.compare.elements import element_difference
from tpcheck.compare.stored import Stored


def story_of(
    name: str, actual: torch.Tensor, expected: torch.Tensor, others: Mapping[str, torch.Tensor]
) -> Story | None:
    """Return what happened to a tensor that is not the expected one, or None where its bits do not tell.

    Args:
        name: Of the parameter.
        others: Other tensors that it may be instead, by name.
    """
    ours, theirs = _Tensors({name: actual}), _Tensors({**others, name: expected})
    pair = Stored(ours, name), Stored(theirs, name)
    difference = element_difference(*pair) if actual.shape == expected.shape else None
    with BitComparer() as comparer:
        return explain_tensor(Case(*pair, difference, Surroundings(theirs, {}, comparer)))


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Implements `adapters.Checkpoint` over a mapping."""

    tensors: Mapping[str, torch.Tensor]
    description: str = "tensors in memory"
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    torn: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: range) -> torch.Tensor:
        tensor = self.tensors[name].detach()
        return (tensor[rows.start : rows.stop] if tensor.dim() else tensor).cpu().contiguous()

    def extent(self, name: str) -> None:
        return None

    def close(self) -> None:
        """There is nothing to let go of."""

    def require_unchanged(self) -> None:
        """Tensors in memory belong to this run alone."""
