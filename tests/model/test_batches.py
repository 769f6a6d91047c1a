"""Batches: synthetic tokens, rows of a dict, or a callable's, the same each time and in the dtype of the run."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpcheck import UsageError
from tpcheck.model.batches import Batch, batch_size, copy_batch, make_batches
from tpcheck.model.options import BatchSource, RunOptions, Tokens

MODEL: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=9))


def made(batch: BatchSource, dp: int = 1, steps: int = 1, **options: Any) -> list[list[Batch]]:
    return make_batches(RunOptions(batch=batch, steps=steps, **options), MODEL, dp, torch.device("cpu"))


def test_the_default_batch_is_contiguous_and_without_padding() -> None:
    ((batch,),) = made(None)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {"input_ids": (2, 16), "labels": (2, 16)}
    assert batch["input_ids"].is_contiguous()


def test_tokens_differ_by_step_dp_rank_and_seed_alone() -> None:
    def tokens(**options: Any) -> list[torch.Tensor]:
        return [batch["input_ids"] for by_dp_rank in made(None, dp=2, steps=2, **options) for batch in by_dp_rank]

    first, again, other = tokens(seed=3), tokens(seed=3), tokens(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(tensor.flatten().tolist()) for tensor in (*first, *other)}) == 8


def test_strided_tokens_are_equal_and_not_contiguous() -> None:
    ((plain,),), ((strided,),) = made(Tokens(3, 7)), made(Tokens(3, 7, strided=True))
    assert all(torch.equal(plain[name], strided[name]) for name in plain)
    assert not any(tensor.is_contiguous() for tensor in strided.values())


def test_padding_is_masked_and_its_labels_are_ignored() -> None:
    ((batch,),) = made(Tokens(3, 20, padded=True))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["labels"][~padding] == batch["input_ids"][~padding]).all()
    assert not padding[:, :10].any()


def test_a_whole_batch_is_divided_among_the_dp_ranks() -> None:
    source = {"x": torch.arange(8.0).reshape(4, 2), "weight": torch.ones(3), "note": "text"}
    ((first, second),) = made(source, dp=2, dtype="float32")
    assert torch.equal(torch.cat([first["x"], second["x"]]), source["x"])
    assert torch.equal(first["weight"], source["weight"])
    assert first["note"] == second["note"] == "text"


def test_a_batch_that_cannot_be_divided_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="a first dim that dp=2 divides"):
        made({"x": torch.ones(3, 2)}, dp=2)


def test_a_callable_is_asked_for_each_dp_rank_and_step() -> None:
    def source(coordinate: Mapping[str, int], step: int) -> dict[str, Any]:
        return {"x": torch.tensor([coordinate["dp"], step])}

    assert [[batch["x"].tolist() for batch in row] for row in made(source, dp=2, steps=2)] == [
        [[0, 0], [1, 0]],
        [[0, 1], [1, 1]],
    ]


def test_a_callable_that_returns_no_dict_is_bad_usage() -> None:
    nothing: Any = lambda coordinate, step: None  # noqa: E731
    with pytest.raises(UsageError, match="a callable that returns a dict"):
        made(nothing)


def test_floating_point_tensors_are_cast_and_integers_are_not() -> None:
    ((batch,),) = made({"x": torch.ones(1), "ids": torch.ones(1, dtype=torch.int32)}, dtype="bfloat16")
    assert (batch["x"].dtype, batch["ids"].dtype) == (torch.bfloat16, torch.int32)


def test_tokens_need_a_vocabulary() -> None:
    model: Any = SimpleNamespace()
    with pytest.raises(UsageError, match="no config"):
        make_batches(RunOptions(), model, 1, torch.device("cpu"))


def test_a_copy_shares_no_memory_and_keeps_requires_grad() -> None:
    batch = {"x": torch.ones(2, requires_grad=True), "n": 3}
    copy = copy_batch(batch)
    copy["x"].detach().zero_()
    assert batch["x"].sum() == 2
    assert copy["x"].requires_grad
    assert copy["x"].is_leaf
    assert copy["n"] == 3


def test_the_batch_size_is_that_of_the_first_tensor() -> None:
    assert batch_size({"scale": torch.tensor(1.0), "x": torch.ones(5, 2)}) == 5
    assert batch_size({"note": "text"}) == 1
