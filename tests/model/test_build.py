"""Models are built equal under one seed, with weights under which bugs show, and so are their batches."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tpcheck import UsageError
from tpcheck.model.build import (
    Batch,
    batch_size,
    build_model,
    copy_batch,
    find_loss,
    loss_of,
    make_batches,
    require_equal_models,
)
from tpcheck.model.options import BatchSource, Request, RunOptions, Tokens
from tpcheck.numerics.tensors import copy_parameters


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3, padding_idx=0)
        self.linear, self.norm, self.dropout = nn.Linear(3, 3), nn.LayerNorm(3), nn.Dropout(0.5)
        self.attention_dropout = 0.1


def built(seed: int = 0, dtype: str = "float64", spread_weights: bool = False) -> Any:
    request = Request(Small, RunOptions(seed=seed, dtype=dtype), spread_weights)
    return build_model(request, torch.device("cpu"))


def test_equal_seeds_build_equal_models_and_different_seeds_do_not() -> None:
    first, second, other = built(), built(), built(seed=1)
    require_equal_models(second, first, copy_parameters(first))
    with pytest.raises(UsageError, match="the same weights each time"):
        require_equal_models(other, first, copy_parameters(first))


def test_one_model_returned_twice_is_bad_usage() -> None:
    model = built()
    with pytest.raises(UsageError, match="a new model at each call"):
        require_equal_models(model, model, copy_parameters(model))


def test_weights_that_are_nan_are_equal() -> None:
    first, second = built(), built()
    with torch.no_grad():
        first.linear.bias.fill_(torch.nan)
        second.linear.bias.fill_(torch.nan)
    require_equal_models(second, first, copy_parameters(first))


def test_constant_parameters_are_drawn_away_from_their_constants() -> None:
    model = built()
    for tensor, constant in ((model.norm.weight, 1), (model.norm.bias, 0), (model.embedding.weight[0], 0)):
        assert ((tensor - constant).abs() >= 0.1).all()
        assert len(set(tensor.tolist())) == len(tensor)


def test_weights_that_are_drawn_already_stay() -> None:
    torch.manual_seed(0)
    plain = Small().double()
    assert torch.equal(built().linear.weight, plain.linear.weight)


def test_matrices_are_spread_on_request() -> None:
    assert built(spread_weights=True).linear.weight.std().item() == pytest.approx(3**-0.5)


def test_dropout_is_disabled_and_the_model_trains() -> None:
    model = built()
    assert (model.dropout.p, model.attention_dropout, model.training) == (0.0, 0.0, True)


def test_the_model_is_in_the_dtype_of_the_run() -> None:
    assert built(dtype="bfloat16").linear.weight.dtype is torch.bfloat16


def test_what_is_no_module_is_bad_usage() -> None:
    with pytest.raises(UsageError, match=r"a callable that returns a torch\.nn\.Module"):
        build_model(Request(dict, RunOptions()), torch.device("cpu"))


LOSS = torch.ones((), requires_grad=True)
LOGITS = torch.ones(2, 2, requires_grad=True)


@pytest.mark.parametrize(
    "output",
    [SimpleNamespace(loss=LOSS), {"loss": LOSS}, LOSS, LOSS.reshape(1), (LOGITS, LOSS), (None, LOSS)],
    ids=["attribute", "item", "scalar", "one element", "tuple", "tuple with None"],
)
def test_the_loss_is_found(output: Any) -> None:
    assert loss_of(output).shape == ()


@pytest.mark.parametrize("output", [LOGITS, {"loss": None}, torch.ones(()), (LOGITS,)])
def test_an_output_without_a_loss_is_bad_usage(output: Any) -> None:
    assert find_loss(output) is None
    with pytest.raises(UsageError, match="a model that returns its loss"):
        loss_of(output)


MODEL: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=9))


def made(batch: BatchSource, dp: int = 1, steps: int = 1, **options: Any) -> list[list[Batch]]:
    made = make_batches(RunOptions(batch=batch, steps=steps, **options), MODEL, dp, torch.device("cpu"))
    return [[micro_batches[0] for micro_batches in step] for step in made]


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


def micro_batches(batch: BatchSource, accumulate: int, dp: int = 1, **options: Any) -> list[list[Batch]]:
    """Return the micro-batches of one step, by DP rank."""
    (step,) = make_batches(RunOptions(batch=batch, steps=1, **options), MODEL, dp, torch.device("cpu"), accumulate)
    return step


def test_a_whole_batch_is_divided_among_the_micro_batches_of_each_dp_rank() -> None:
    step = micro_batches({"x": torch.arange(8)}, 2, dp=2)
    assert [[batch["x"].tolist() for batch in of_rank] for of_rank in step] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    with pytest.raises(UsageError, match="a first dim that dp=2 times accumulate=3 divides"):
        micro_batches({"x": torch.arange(8)}, 3, dp=2)


def test_a_callable_is_told_which_micro_batch_it_makes() -> None:
    (of_rank,) = micro_batches(lambda coordinate, step: {"x": torch.tensor([coordinate["micro_batch"]])}, 3)
    assert [batch["x"].item() for batch in of_rank] == [0, 1, 2]


def test_micro_batches_have_other_tokens_and_for_a_mean_over_labels_unlike_numbers_of_them() -> None:
    (of_rank,) = micro_batches(None, 4, loss="token_mean")
    assert len({tuple(batch["input_ids"].flatten().tolist()) for batch in of_rank}) == 4
    assert len({int((batch["labels"] != -100).sum()) for batch in of_rank}) > 1
    assert all((batch["labels"][:, -2:] != -100).all() for batch in of_rank)


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
