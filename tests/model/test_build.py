"""Models are built bitwise equal under a seed, with weights that show bugs and without dropout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tpcheck import UsageError
from tpcheck.model.build import build_model, find_loss, loss_of, require_equal_models
from tpcheck.model.options import Request, RunOptions
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
