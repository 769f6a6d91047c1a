"""A tensor that is not the reference's, and what else there is to compare it with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpcheck.adapters import Checkpoint
from tpcheck.compare.bits import BitComparer
from tpcheck.compare.elements import ElementDifference
from tpcheck.compare.stored import Stored

_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_out|lm_head|shared)\.")


@dataclass(frozen=True, slots=True)
class Story:
    """What happened to a tensor.

    Attributes:
        cause: Slug of the cause.
        details: What its test found, JSON-able: which rank, which dim, which permutation, which dtype.
    """

    cause: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a tensor can be compared with beside its own counterpart.

    Attributes:
        reference: The whole reference.
        earlier: Checkpoints of earlier steps, by what the caller calls them, with the names of this reference.
        comparer: Compares bits.
    """

    reference: Checkpoint
    earlier: Mapping[str, Checkpoint]
    comparer: BitComparer

    def equal(self, actual: Stored, expected: Stored) -> bool:
        """Return whether two tensors have one shape, one dtype and the same bits."""
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return False
        return self.comparer.equal(actual, expected)


@dataclass(frozen=True, slots=True)
class Case:
    """A tensor whose values, shape or dtype are not those of its counterpart in the reference.

    Attributes:
        actual, expected: Both sides, of one dtype: where the stored ones differ, the expected one is rounded.
        difference: Which elements differ, where the shapes are equal.
        surroundings: What else there is.
    """

    actual: Stored
    expected: Stored
    difference: ElementDifference | None
    surroundings: Surroundings

    @property
    def same_shape(self) -> bool:
        return self.actual.shape == self.expected.shape

    def is_vocabulary(self, dim: int) -> bool:
        """Return whether the indices of `dim` are tokens, by the model's configuration or by the usual names."""
        size = self.surroundings.reference.config.get("vocab_size")
        if isinstance(size, int):
            return bool(self.expected.shape[dim] == size)
        return dim == 0 and _VOCABULARY.search(f".{self.expected.name}") is not None
