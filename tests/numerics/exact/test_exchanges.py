"""What converters between conventions do to a tensor: exchanged matrices, the order of rotary rows, offsets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.numerics.exact.tensors import Tensors
from tpcheck.checkpoints.comparison import compare_checkpoints
from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.exact.explain import explain_tensor_in_memory

GENERATOR = torch.Generator().manual_seed(11)
LAYER = "model.layers.0"
QKV, GATE_UP, Q = f"{LAYER}.self_attn.qkv_proj.weight", f"{LAYER}.mlp.gate_up_proj.weight", f"{LAYER}.q_proj.weight"


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def explained(name: str, actual: Tensor, expected: Tensor) -> Explanation | None:
    return explain_tensor_in_memory(name, actual, expected, {})


def cause_of(name: str, actual: Tensor, expected: Tensor) -> Cause | None:
    explanation = explained(name, actual, expected)
    return explanation.cause if explanation else None


def reordered(tensor: Tensor, sizes: Sequence[int], order: Sequence[int], dim: int = 0) -> Tensor:
    blocks = tensor.split(list(sizes), dim)
    return torch.cat([blocks[place] for place in order], dim)


def half_split(tensor: Tensor, head: int, rotated: int | None = None) -> Tensor:
    """Take pairs apart, as transformers' `permute` does, in the first `rotated` rows of each head."""
    rotated = rotated or head
    heads = tensor.reshape(-1, head, *tensor.shape[1:])
    pairs = heads[:, :rotated].reshape(len(heads), rotated // 2, 2, *tensor.shape[1:]).transpose(1, 2)
    return torch.cat([pairs.reshape(heads[:, :rotated].shape), heads[:, rotated:]], 1).reshape(tensor.shape)


# ---- gate and up, keys and values, fused


@pytest.mark.parametrize(
    ("name", "sizes", "order", "cause"),
    [
        (GATE_UP, [8, 8], [1, 0], Cause.GATE_UP_EXCHANGED),
        (GATE_UP, [4, 4, 4, 4], [0, 3, 2, 1], Cause.GATE_UP_EXCHANGED),  # on rank 1 of 2
        (QKV, [8, 4, 4], [0, 2, 1], Cause.KEY_VALUE_EXCHANGED),
        (QKV, [8, 2, 2, 2, 2], [0, 1, 4, 3, 2], Cause.KEY_VALUE_EXCHANGED),  # on rank 1 of 2
        (QKV, [4, 2, 2, 4, 2, 2], [0, 2, 1, 3, 5, 4], Cause.KEY_VALUE_EXCHANGED),  # in each group of heads
        (Q, [8, 8], [1, 0], Cause.SHARD_ORDER_SWAPPED),
        (f"{LAYER}.mlp.linear_fc1.weight", [8, 8], [1, 0], Cause.SHARD_ORDER_SWAPPED),  # perhaps without a gate
        (GATE_UP, [4, 4, 4, 4], [1, 0, 3, 2], Cause.SHARD_ORDER_SWAPPED),
        (GATE_UP, [4, 4, 4, 4], [0, 2, 1, 3], Cause.FUSED_BLOCKS_INTERLEAVED),
        (QKV, [4, 4, 4, 4], [1, 0, 2, 3], Cause.SHARD_ORDER_SWAPPED),  # two heads of the queries
    ],
)
def test_blocks_of_a_fused_tensor_that_are_exchanged(
    name: str, sizes: list[int], order: list[int], cause: Cause
) -> None:
    expected = drawn(sum(sizes), 3)
    assert cause_of(name, reordered(expected, sizes, order), expected) is cause


def test_gate_and_up_of_experts_are_exchanged_along_the_second_dim() -> None:
    expected = drawn(4, 8, 3)
    explanation = explained(f"{LAYER}.mlp.experts.gate_up_proj", reordered(expected, [4, 4], [1, 0], 1), expected)
    assert explanation == Explanation(Cause.GATE_UP_EXCHANGED, evidence={"dim": 1, "distance": 4, "rows": [[0, 4]]})


@pytest.mark.parametrize("order", [[1, 0], [0, 2, 1, 3]])  # between ranks of four experts, between four ranks
def test_experts_that_change_places_are_no_exchange_of_their_blocks(order: list[int]) -> None:
    expected = drawn(8, 8, 6)
    actual = reordered(expected, [8 // len(order)] * len(order), order)
    explanation = explained(f"{LAYER}.mlp.experts.gate_up_proj", actual, expected)
    assert explanation is not None
    assert explanation.cause is Cause.SHARD_ORDER_SWAPPED


def test_the_rank_that_exchanged_gate_and_up_is_named() -> None:
    expected = drawn(16, 3)
    explanation = explained(GATE_UP, reordered(expected, [4, 4, 4, 4], [0, 3, 2, 1]), expected)
    assert explanation is not None
    assert (explanation.evidence["tp_rank"], explanation.evidence["tp"]) == (1, 2)


def test_values_of_two_ranks_that_change_places_are_not_keys_and_values() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    expected = Tensors({QKV: drawn(16, 3)}, config=config)
    swapped = Tensors({QKV: reordered(expected.tensors[QKV], [12, 2, 2], [0, 2, 1])})
    (finding,) = compare_checkpoints(swapped, expected).findings
    assert finding.cause == Cause.SHARD_ORDER_SWAPPED.slug


# ---- two parameters


@pytest.mark.parametrize(
    ("first", "second", "cause"),
    [
        ("mlp.gate_proj.weight", "mlp.up_proj.weight", Cause.GATE_UP_EXCHANGED),
        ("block_sparse_moe.experts.3.w1.weight", "block_sparse_moe.experts.3.w3.weight", Cause.GATE_UP_EXCHANGED),
        ("DenseReluDense.wi_0.weight", "DenseReluDense.wi_1.weight", Cause.GATE_UP_EXCHANGED),
        ("self_attn.k_proj.weight", "self_attn.v_proj.weight", Cause.KEY_VALUE_EXCHANGED),
        ("attention.self.key.bias", "attention.self.value.bias", Cause.KEY_VALUE_EXCHANGED),
        ("input_layernorm.weight", "post_attention_layernorm.weight", Cause.TENSOR_OF_ANOTHER_LAYER),
    ],
)
def test_two_parameters_that_hold_each_other_s_tensor(first: str, second: str, cause: Cause) -> None:
    names = f"{LAYER}.{first}", f"{LAYER}.{second}"
    tensors = dict(zip(names, drawn(2, 8, 3), strict=True))
    exchanged = dict(zip(names[::-1], tensors.values(), strict=True))
    findings = compare_checkpoints(Tensors(exchanged), Tensors(tensors)).findings
    assert {finding.cause for finding in findings} == {cause.slug}
    assert not any("Renumber" in finding.evidence["advice"] for finding in findings)
    of_one_rank = {name: torch.cat([tensors[name][:4], exchanged[name][4:]]) for name in names}
    findings = compare_checkpoints(Tensors(of_one_rank), Tensors(tensors)).findings
    expected = {cause.slug} if cause is not Cause.TENSOR_OF_ANOTHER_LAYER else {None}
    assert {finding.cause for finding in findings} == expected


def test_a_gate_in_the_place_of_up_that_is_not_exchanged_is_another_parameter_s() -> None:
    names = f"{LAYER}.gate_proj.weight", f"{LAYER}.up_proj.weight"
    gate, up = drawn(2, 8, 3)
    (finding,) = compare_checkpoints(
        Tensors(dict(zip(names, (gate, gate), strict=True))), Tensors(dict(zip(names, (gate, up), strict=True)))
    ).findings
    assert finding.cause == Cause.TENSOR_OF_ANOTHER_LAYER.slug
    assert "name map" in finding.evidence["advice"]


def test_the_tensor_of_another_layer_is_advised_as_such() -> None:
    tensors = {f"model.layers.{layer}.up_proj.weight": drawn(4, 3) for layer in range(2)}
    wrong = dict.fromkeys(tensors, tensors["model.layers.0.up_proj.weight"])
    (finding,) = compare_checkpoints(Tensors(wrong), Tensors(tensors)).findings
    assert finding.evidence["advice"].startswith("Renumber the layers")


# ---- rotary


@pytest.mark.parametrize("head", [8, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_heads_in_the_other_order(head: int, dtype: torch.dtype) -> None:
    for shape in ((4 * head, 5), (2 * head,), (head, 5)):
        expected = drawn(*shape).to(dtype) if len(shape) > 1 else drawn(*shape)
        there = explained(Q, half_split(expected, head), expected)
        back = explained(Q, expected, half_split(expected, head))
        assert there is not None
        assert back is not None
        assert there.cause is back.cause is Cause.ROTARY_LAYOUT
        assert (there.evidence["rotary_dim"], there.evidence["heads"]) == (head, len(expected) // head)
        assert (there.evidence["order"], back.evidence["order"]) == ("half-split", "interleaved")


def test_heads_that_are_rotated_in_part_or_of_which_some_are_concerned() -> None:
    expected = drawn(64, 3)
    assert cause_of(Q, half_split(expected, 16, rotated=8), expected) is Cause.ROTARY_LAYOUT
    of_one_rank = torch.cat([expected[:32], half_split(expected[32:], 16)])
    assert cause_of(Q, of_one_rank, expected) is Cause.ROTARY_LAYOUT
    fused = torch.cat([half_split(expected[:48], 16), expected[48:]])  # the values keep their order
    assert cause_of(QKV, fused, expected) is Cause.ROTARY_LAYOUT
    assert cause_of(Q, half_split(expected, 16) + 1e-3 * drawn(64, 3), expected) is None


def test_an_order_of_rows_like_that_in_another_parameter_is_not_rotary() -> None:
    expected = drawn(16, 3)
    interleaved = half_split(expected, 16)
    assert cause_of(GATE_UP, interleaved, expected) is Cause.FUSED_BLOCKS_INTERLEAVED
    assert cause_of(f"{LAYER}.mlp.down_proj.weight", half_split(expected, 8), expected) is not Cause.ROTARY_LAYOUT
    assert cause_of(Q, reordered(expected, [4] * 4, [0, 2, 1, 3]), expected) is Cause.SHARD_ORDER_SWAPPED


# ---- offsets


@pytest.mark.parametrize("constant", [-1.0, 1.0, 0.25, 3.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norm_weights_plus_a_constant(constant: float, dtype: torch.dtype) -> None:
    weight = (1 + 0.3 * drawn(64)).to(dtype)
    for actual, expected in ((weight + constant, weight), (weight, weight - constant)):
        explanation = explained("model.norm.weight", actual, expected)
        assert explanation is not None
        assert explanation.cause is Cause.OFFSET_BY_CONSTANT
        assert explanation.evidence["constant"] == pytest.approx(constant, rel=0.03)
        if abs(constant) == 1:
            assert explanation.evidence["constant"] == constant


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.full((8,), 3.5), torch.full((8,), 2.0)),  # any two constants
        (1.5 * torch.linspace(1, 2, 8), torch.linspace(1, 2, 8)),  # a factor
        (torch.linspace(1, 2, 8) + torch.tensor([1.0] * 7 + [1.01]), torch.linspace(1, 2, 8)),
        (torch.linspace(1, 2, 8).bfloat16() * 1.0079, torch.linspace(1, 2, 8).bfloat16()),  # an ulp
    ],
)
def test_what_is_not_one_constant_has_no_cause(actual: Tensor, expected: Tensor) -> None:
    assert cause_of("model.norm.weight", actual, expected) is None


def test_simpler_causes_come_before_a_constant() -> None:
    weight = 1 + drawn(8)
    assert cause_of("norm.weight", torch.zeros(8), weight) is Cause.ALL_ZERO
    assert cause_of("norm.weight", 2 * torch.ones(8), torch.ones(8)) is Cause.DUPLICATE_REDUCE
