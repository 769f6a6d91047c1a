"""What is cache of earlier batches changes no digest."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch

from tpcheck.batches.leaves import DigestedBatch, StructureCache


def of_tensors(shift: float) -> dict[str, Any]:
    return {
        "b": torch.ones(2, 3) * shift,
        "a": [torch.arange(4), {"c": torch.ones(2).bool()}],
        "n": 3,
        "t": ("x", None),
    }


KINDS: dict[str, Any] = {
    "tensors": of_tensors,
    "user dict": lambda shift: UserDict(of_tensors(shift)),
    "not contiguous": lambda shift: {"a": (torch.ones(2, 3) * shift).t(), "b": torch.ones(2, 3).t()},
    "number": lambda shift: {"a": torch.ones(2), "n": shift},
    "array": lambda shift: {"a": torch.ones(2), "b": np.full(3, shift)},
    "sparse": lambda shift: [torch.ones(2), (torch.eye(2) * shift).to_sparse()],
    "key that is no text": lambda shift: {1: torch.ones(2) * shift},
    "parameter": lambda shift: [torch.nn.Parameter(torch.ones(2) * shift)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_one_token_whatever_came_before(kind: str) -> None:
    cache = StructureCache()
    make = KINDS[kind]
    for shift in (1.0, 2.0, 2.0, -2.0, 1.0):
        anew, again = DigestedBatch(make(shift)), DigestedBatch(make(shift), cache)
        assert again.fingerprint == anew.fingerprint
        assert again.leaves == anew.leaves
        assert [entry.path for entry in again.contents] == [leaf.path for leaf in again.leaves]
    assert DigestedBatch(make(1.0), cache).fingerprint != DigestedBatch(make(2.0), cache).fingerprint


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0.0, -0.0),
        (1, True),
        ([1, 2], (1, 2)),
        ({"a": 1}, UserDict({"a": 1})),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 1), torch.zeros(1, 2)),
        (torch.zeros(2), torch.zeros(2, device="meta")),
        ([[torch.ones(1)], torch.ones(1)], [[torch.ones(1), torch.ones(1)]]),
        ("a", b"a"),
    ],
)
def test_a_change_of_anything_but_bits_is_seen(before: Any, after: Any) -> None:
    cache = StructureCache()
    first = DigestedBatch({"x": before}, cache).fingerprint
    assert DigestedBatch({"x": after}, cache).fingerprint == DigestedBatch({"x": after}).fingerprint != first


def test_the_batch_is_told_as_it_was() -> None:
    batch = {"a": torch.ones(2), "labels": torch.ones(2)}
    digested = DigestedBatch(batch)
    del batch["labels"]  # as trainers do
    assert [entry.path for entry in digested.contents] == ["", "a", "labels"]
