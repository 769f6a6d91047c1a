"""Batches that only the tests need: an order that no forked world shows, and values that are odd but equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tpcheck import Rank
from tpcheck.lab.faults.pipelines import LENGTH, Batches, Named, by_replica


def from_a_set(rank: Rank, ordered: bool) -> Batches:
    words = {f"word-{number:02d}" for number in range(LENGTH)}
    return by_replica(rank, Named(sorted(words) if ordered else list(words)))


def odd_but_equal(rank: Rank) -> Iterator[Any]:
    """NaN, empty tensors and batches without samples, the same on all ranks of a TP group."""
    for step in range(4):
        base = float(10 * rank.dp_rank + step)
        yield {"x": torch.tensor([float("nan"), base, -0.0]), "empty": torch.zeros(0, 3), "none": None, "n": base}
    yield {"x": torch.zeros(0, 3), "labels": torch.zeros(0, dtype=torch.int64)}
