"""Each cause is named for what it is, and nothing is named where the bits do not show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tpcheck.core.causes import Cause
from tpcheck.numerics.exact import explain
from tpcheck.numerics.exact.explain import explain_tensor_in_memory

torch.manual_seed(3)
EXPECTED = torch.randn(8, 6)
OTHER = torch.randn(8, 6)
NAME, OTHER_NAME = "layers.0.k.weight", "layers.1.k.weight"
PARTNER, PARTNER_NAME = torch.randn(8, 6), "layers.0.v.weight"


def with_rows(rows: torch.Tensor, start: int = 2) -> torch.Tensor:
    tensor = EXPECTED.clone()
    tensor[start : start + len(rows)] = rows
    return tensor


def with_bit_flipped(bit: int) -> torch.Tensor:
    tensor = EXPECTED.clone()
    tensor.view(torch.int32)[4, 1] ^= torch.tensor(1).bitwise_left_shift(bit).to(torch.int32)
    return tensor


CASES: dict[str, tuple[torch.Tensor, Cause | None, dict[str, Any]]] = {
    "a bit": (with_bit_flipped(7), Cause.BIT_FLIPPED, {"bit": 7, "index": [4, 1]}),
    "the sign": (with_bit_flipped(31), Cause.BIT_FLIPPED, {"bit": 31, "index": [4, 1]}),
    "NaN": (with_rows(torch.full((2, 6), float("nan"))), Cause.NOT_FINITE, {"count_not_finite": 12}),
    "zeros": (with_rows(torch.zeros(3, 6)), Cause.ALL_ZERO, {"rows": [2, 5]}),
    "an earlier step": (with_rows(EXPECTED[2:4] + 1), Cause.STALE_WEIGHT, {"equals": "step 1", "rows": [2, 4]}),
    "rounded": (
        with_rows(EXPECTED[5:].bfloat16().float(), 5),
        Cause.DTYPE_ROUNDED,
        {"dtype": "bfloat16", "rows": [5, 8]},
    ),
    "rows of two heads of four": (
        EXPECTED[[0, 2, 1, 3, 4, 6, 5, 7]],
        Cause.ROTARY_LAYOUT,
        {"dim": 0, "rotary_dim": 4, "heads": 2, "first": 0, "order": "half-split"},
    ),
    "added up": (with_rows(EXPECTED[2:] * 4), Cause.DUPLICATE_REDUCE, {"factor": 4, "rows": [2, 8]}),
    "transposed": (EXPECTED.T.contiguous(), Cause.TRANSPOSED, {}),
    "another layer": (OTHER, Cause.TENSOR_OF_ANOTHER_LAYER, {"equals": OTHER_NAME}),
    "a shard of columns": (EXPECTED[:, 3:], Cause.SHARD_MISSING, {"dim": 1, "tp_rank": 1, "tp": 2, "from": 3}),
    "keys for values": (PARTNER, Cause.KEY_VALUE_EXCHANGED, {"partner": PARTNER_NAME, "rows": [0, 8]}),
    "noise": (EXPECTED + 1e-3, None, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_happened_to_a_tensor_is_named(name: str) -> None:
    actual, cause, evidence = CASES[name]
    explanation = explained(actual)
    assert (explanation.cause if explanation else None) == cause
    assert explanation is None or dict(explanation.evidence) == evidence


def explained(actual: torch.Tensor) -> Any:
    steps = {"step 1": EXPECTED + 1}
    others = {OTHER_NAME: OTHER, PARTNER_NAME: PARTNER}
    return explain_tensor_in_memory(
        NAME, actual, EXPECTED, others, earlier=steps, actual_others={PARTNER_NAME: EXPECTED}
    )


NAMED_ELSEWHERE = {"offset_by_constant"}  # of vectors: tests/numerics/exact/test_exchanges.py


@pytest.mark.parametrize(
    "test", [test for test in explain.TESTS if test.__name__ not in NAMED_ELSEWHERE], ids=lambda test: test.__name__
)
def test_every_test_names_a_case_that_no_other_does(test: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = [explained(actual) for actual, *_ in CASES.values()]
    monkeypatch.setattr(explain, "TESTS", tuple(other for other in explain.TESTS if other is not test))
    assert [explained(actual) for actual, *_ in CASES.values()] != before


def test_one_zero_among_many_elements_has_no_cause() -> None:
    actual = EXPECTED.clone()
    actual[3, 3] = 0
    assert explained(actual) is None


def test_one_element_that_is_doubled_has_no_cause() -> None:
    actual = EXPECTED.clone()
    actual[3, 3] *= 3
    assert explained(actual) is None


def test_a_constant_tensor_is_not_another_layer_s() -> None:
    ones = torch.ones(8, 6)
    assert explain_tensor_in_memory(NAME, ones, EXPECTED, {OTHER_NAME: ones.clone()}) is None


def test_a_layer_of_the_same_kind_is_tried_first() -> None:
    others = {"a.copy.weight": OTHER, OTHER_NAME: OTHER}
    explanation = explain_tensor_in_memory(NAME, OTHER, EXPECTED, others)
    assert explanation is not None
    assert explanation.evidence == {"equals": OTHER_NAME}


@pytest.mark.parametrize(
    ("name", "cause"), [("x.weight", Cause.WRONG_SHARD_BOUNDARY), ("lm_head.weight", Cause.VOCAB_OFFSET_WRONG)]
)
def test_the_usual_names_of_a_vocabulary_are_known(name: str, cause: Cause) -> None:
    explanation = explain_tensor_in_memory(name, torch.cat([EXPECTED, OTHER[:1]]), EXPECTED, {})
    assert explanation is not None
    assert explanation.cause == cause


def test_all_equal_slices_show_nothing() -> None:
    assert explain_tensor_in_memory(NAME, torch.ones(4, 2), torch.ones(8, 2), {}) is None


def cause_of(actual: torch.Tensor, expected: torch.Tensor = EXPECTED, name: str = NAME, **others: Any) -> Cause | None:
    explanation = explain_tensor_in_memory(name, actual, expected, {}, **others)
    return explanation.cause if explanation else None


def test_one_element_of_a_column_that_is_a_multiple_has_no_cause() -> None:
    expected = EXPECTED[:, :1].contiguous()
    changed = expected.clone()
    changed[3] *= 3
    assert cause_of(changed, expected) is None
    assert cause_of(expected * 2, expected) is Cause.DUPLICATE_REDUCE


def test_a_tensor_times_minus_one_or_in_the_place_of_zeros_is_not_added_up() -> None:
    assert cause_of(-EXPECTED) is None
    assert cause_of(EXPECTED, EXPECTED * 0) is None
    assert cause_of(EXPECTED * 1.5) is None


def test_a_partition_of_an_earlier_step_may_end_within_a_row() -> None:
    stale = EXPECTED.clone().flatten()
    stale[:20] += 1  # three rows of six, and two elements
    explanation = explained(stale.reshape(EXPECTED.shape))
    assert (explanation.cause, dict(explanation.evidence)) == (Cause.STALE_WEIGHT, {"equals": "step 1", "rows": [0, 4]})
    stale[1] += 1
    assert explained(stale.reshape(EXPECTED.shape)) is None


def test_only_matrices_are_transposed() -> None:
    assert cause_of(OTHER.T.contiguous()) is None
    assert cause_of(EXPECTED[:, :1].T.contiguous(), EXPECTED[:, :1]) is not Cause.TRANSPOSED
    assert cause_of(torch.empty(0, 6)) is None
    assert cause_of(EXPECTED[:4, :3]) is None  # both dims are shorter
    assert cause_of(EXPECTED.reshape(8, 6, 1)) is None


def test_each_matrix_of_a_stack_may_be_transposed() -> None:
    experts = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(3))
    assert cause_of(experts.transpose(1, 2).contiguous(), experts) is Cause.TRANSPOSED
    assert cause_of(experts[:, :, :5].transpose(1, 2).contiguous(), experts[:, :, :5]) is Cause.TRANSPOSED
    assert cause_of(experts.transpose(0, 1).contiguous(), experts) is None


def test_the_sign_of_a_zero_is_no_damaged_bit() -> None:
    zeros = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert cause_of(torch.tensor([[-0.0, 1.0], [2.0, 3.0]]), zeros) is None


@pytest.mark.parametrize("earlier", [EXPECTED[:4] + 1, (EXPECTED + 1).double(), EXPECTED - 1])
def test_an_earlier_step_of_another_kind_is_not_stale(earlier: torch.Tensor) -> None:
    assert cause_of(with_rows(EXPECTED[2:4] + 1), earlier={"step 1": earlier}) is None


@pytest.mark.parametrize("other", [OTHER.double(), OTHER.reshape(6, 8), OTHER[:4]])
def test_a_layer_of_another_shape_or_dtype_is_not_this_one(other: torch.Tensor) -> None:
    assert explain_tensor_in_memory(NAME, OTHER, EXPECTED, {OTHER_NAME: other}) is None


def test_columns_are_no_tokens() -> None:
    wider = torch.cat([EXPECTED, OTHER[:, :1]], dim=1)
    assert cause_of(wider, name="lm_head.weight") is Cause.WRONG_SHARD_BOUNDARY
