"""Digests of rows do not depend on their order, and come with their entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpcheck.batches.leaves import DigestedBatch
from tpcheck.batches.samples import Samples, any_order
from tpcheck.batches.samples import samples_of as samples_of_digested
from tpcheck.core.digests import _row_sums


def sampled(batch: Any) -> bytes | None:
    return any_order(DigestedBatch(batch).samples)


def samples_of(batch: Any) -> Samples:
    return samples_of_digested(DigestedBatch(batch))


BATCH = {
    "pixels": torch.randn(6, 3, 8, 8),
    "labels": torch.randint(10, (6,)),
    "weights": torch.rand(6).numpy(),
    "scale": torch.ones(3),
}


def test_the_same_rows_in_another_order_have_the_same_digest() -> None:
    order = torch.randperm(6)
    shuffled = {key: value[order] if len(value) == 6 else value for key, value in BATCH.items()}
    assert sampled(shuffled) == sampled(BATCH)
    assert sorted(samples_of(shuffled).rows) == sorted(samples_of(BATCH).rows)


def test_reordering_the_rows_of_one_leaf_makes_other_samples() -> None:
    mixed = {**BATCH, "labels": BATCH["labels"].flip(0) + 1}
    assert sampled(mixed) != sampled(BATCH)
    assert set(samples_of(mixed).rows) != set(samples_of(BATCH).rows)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64])
def test_every_dtype_has_rows(dtype: torch.dtype) -> None:
    batch = torch.randn(5, 7).to(dtype)
    assert sampled(batch) == sampled(batch.flip(0))
    assert len(samples_of(batch).rows) == 5


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("size", [1, 3, 32, 100])
@pytest.mark.parametrize("rows", [5, 257])
def test_few_and_many_rows_of_any_layout_have_digests(dtype: torch.dtype, size: int, rows: int) -> None:
    """More rows than are digested in a loop are summed as on a device."""
    batch = {"a": torch.randn(size, rows).to(dtype).t(), "b": torch.randn(rows, 200), "n": torch.arange(rows)}
    order = torch.randperm(rows)
    assert sampled(batch) == sampled({key: value[order] for key, value in batch.items()})
    assert sampled(batch) != sampled({**batch, "b": batch["b"].flip(0)})
    assert sampled(batch) != sampled({**batch, "b": batch["b"] + 1})


def test_digests_of_rows_do_not_depend_on_their_alignment() -> None:
    data = torch.arange(41, dtype=torch.uint8)
    assert sampled(data[1:].view(5, 8)) == sampled(data[1:].clone().view(5, 8))
    assert _row_sums(data[1:].view(5, 8), 5).tolist() == _row_sums(data[1:].clone().view(5, 8), 5).tolist()


@pytest.mark.parametrize("batch", [{}, torch.tensor(1), torch.zeros(0, 3), 1.5, torch.zeros(3, 0)])
def test_batches_without_rows_have_none(batch: Any) -> None:
    assert sampled(batch) is None
    assert samples_of(batch).rows == ()


def test_texts_are_the_samples_of_a_batch_without_tensors() -> None:
    texts = {"text": ["a", "b", "c", "c"], "n": 1}
    found = samples_of(texts)
    assert (found.field, len(found.rows), found.bits) == ("text.0", 4, 6.0)
    assert found.beside != samples_of({**texts, "n": 2}).beside
    reordered = samples_of({"text": ["c", "a", "c", "b"], "n": 1})
    assert (any_order(reordered.rows), reordered.beside) == (any_order(found.rows), found.beside)
    assert samples_of({**texts, "x": torch.ones(())}).rows == ()
    assert samples_of({"name": "train"}).bits == 0


def test_bits_are_the_entropy_of_the_rows() -> None:
    assert samples_of(BATCH).bits > 100
    assert samples_of(BATCH).field == "pixels"
    assert samples_of(torch.ones(4, 100)).bits == 0
    assert samples_of(torch.arange(64).repeat(4, 1)).bits == 0  # positions: all rows alike
    assert samples_of(torch.tensor([0, 1, 1, 0])).bits == 4
