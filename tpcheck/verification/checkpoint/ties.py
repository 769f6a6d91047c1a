"""Names without a counterpart that are another name of a tensor which has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tpcheck.adapters import Checkpoint
from tpcheck.compare.bits import BitComparer
from tpcheck.compare.stored import Stored
from tpcheck.verification.checkpoint.naming import Matching


@dataclass(frozen=True, slots=True)
class Loose:
    """A name that only one side has.

    Attributes:
        name: That name.
        cause: Slug of what it means.
        evidence: Which tensor it belongs to, where one is found.
    """

    name: str
    cause: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


def loose_names(
    actual: Checkpoint, expected: Checkpoint, matching: Matching, cast: torch.dtype | None = None
) -> tuple[Loose, ...]:
    """Return the names that only one side has, but for ties that are stored once on one side and twice on the other."""
    with BitComparer() as comparer:
        sides = _Sides(actual, expected, matching, cast, comparer)
        missing = [found for name in matching.missing if (found := sides.missing(name)) is not None]
        renamed = {one.evidence.get("stands_as") for one in missing}
        unexpected = [
            found
            for name in matching.unexpected
            if name not in renamed and (found := sides.unexpected(name)) is not None
        ]
    return (*missing, *unexpected)


@dataclass(frozen=True, slots=True)
class _Sides:
    actual: Checkpoint
    expected: Checkpoint
    matching: Matching
    cast: torch.dtype | None
    comparer: BitComparer

    def missing(self, name: str) -> Loose | None:
        declared = _tied_with(self.expected, name)
        if any(other in self.matching.actual_of for other in declared):
            return self._stored_once(name, next(other for other in declared if other in self.matching.actual_of))
        if declared:
            return Loose(name, "tied_weight_dropped", {"tied_with": sorted(declared)})
        twin = self._equal_to(Stored(self.expected, name), self.expected, self.matching.actual_of)
        if twin is not None:
            return self._stored_once(name, twin) if _ties(self.actual) else Loose(
                name, "tied_weight_dropped", {"equals": twin}
            )  # fmt: skip
        other_name = self._equal_to(Stored(self.expected, name, self.cast), self.actual, self.matching.unexpected)
        return Loose(name, "tensor_missing", {"stands_as": other_name} if other_name else {})

    def unexpected(self, name: str) -> Loose | None:
        own = Stored(self.actual, name)
        if self._equal_to(own, self.actual, self.matching.actual_of.values()) is not None:
            return None  # a tie, stored under both names
        if _ties(self.expected):
            partner = next((other for other in self._embeddings() if self.actual.shape(other) == own.shape), None)
            if partner is not None:
                return Loose(name, "tied_weight_untied", {"tied_with": partner})
        return Loose(name, "tensor_unexpected")

    def _stored_once(self, name: str, twin: str) -> Loose | None:
        """A tied weight that is stored under one name is complete, unless its model does not tie it again."""
        if self.actual.config.get("tie_word_embeddings") is False and _is_embedding(name, twin):
            return Loose(name, "tied_weight_dropped", {"tied_with": twin, "tie_word_embeddings": False})
        return None

    def _equal_to(self, one: Stored, others: Checkpoint, names: Iterable[str]) -> str | None:
        """Return the name of a tensor with the same bits; constant ones and scalars say nothing and have none."""
        for name in names:
            other = Stored(others, name)
            alike = name != one.name and other.shape == one.shape and other.dtype == one.dtype and one.numel > 1
            if alike and self.comparer.equal(one, other):
                return name
        return None

    def _embeddings(self) -> Iterable[str]:
        return (name for name in self.matching.actual_of.values() if _is_embedding(name))


def _tied_with(checkpoint: Checkpoint, name: str) -> frozenset[str]:
    return frozenset(other for tie in checkpoint.ties if name in tie for other in tie if other != name)


def _ties(checkpoint: Checkpoint) -> bool:
    """Return whether the model of this checkpoint says that it ties its embeddings."""
    return checkpoint.config.get("tie_word_embeddings") is True


def _is_embedding(*names: str) -> bool:
    return any("emb" in name or "wte" in name or name.endswith("shared.weight") for name in names)
