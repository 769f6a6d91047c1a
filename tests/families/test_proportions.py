"""The sizes of a real configuration become small and keep what TP divides, and every kind of layer."""

from __future__ import annotations

from math import gcd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.families.proportions import proportional_settings, same_division

SIZES = {"hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936, "num_hidden_layers": 12}


@given(st.integers(1, 64), st.integers(1, 16), st.sampled_from([1, 2, 3, 4, 8]))
def test_heads_divide_as_they_did(kv_heads: int, ratio: int, tp: int) -> None:
    real = {"hidden_size": 128 * kv_heads * ratio, "num_attention_heads": kv_heads * ratio}
    small = proportional_settings({**real, "num_key_value_heads": kv_heads}, tp=tp, of_type={})
    heads, small_kv = small["num_attention_heads"], small["num_key_value_heads"]
    assert gcd(heads, tp) == gcd(real["num_attention_heads"], tp)
    assert gcd(small_kv, tp) == gcd(kv_heads, tp)
    assert heads % small_kv == 0
    assert heads // small_kv == ratio or ratio > 8
    assert small_kv >= min(kv_heads, 2)
    assert small["hidden_size"] == 8 * heads
    assert heads <= real["num_attention_heads"]


@given(st.integers(1, 300_000), st.sampled_from([1, 2, 3, 4, 8]))
def test_other_sizes_divide_as_they_did(size: int, tp: int) -> None:
    small = same_division(size, tp, least=128)
    assert small <= size
    assert gcd(small, tp) == gcd(size, tp)
    assert small % 2 == size % 2


def test_the_key_value_heads_of_every_rank_stay() -> None:
    real = {**SIZES, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    small = proportional_settings(real, tp=8, of_type={})
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (32, 8)
    assert (small["hidden_size"], small["head_dim"]) == (256, 8)
    assert small["num_hidden_layers"] == 2


def test_heads_that_are_together_wider_than_the_model_stay_wider() -> None:
    real = {**SIZES, "hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    small = proportional_settings(real, tp=2, of_type={})
    assert small["num_attention_heads"] * small["head_dim"] == 128
    assert small["hidden_size"] == 80


def test_experts_stay_in_proportion_to_those_that_a_token_chooses() -> None:
    small = proportional_settings({"num_experts": 64, "num_experts_per_tok": 8, "n_group": 1}, tp=2, of_type={})
    assert small == {"num_experts": 16, "num_experts_per_tok": 2, "n_group": 1}
    assert proportional_settings({"num_experts": 64}, tp=2, of_type={}) == {"num_experts": 8}


def test_a_rotated_part_of_a_head_consists_of_pairs() -> None:
    real = {"hidden_size": 2560, "num_attention_heads": 32, "rope_parameters": {"partial_rotary_factor": 0.4}}
    small = proportional_settings(real, tp=2, of_type={})
    assert small["hidden_size"] == 10 * small["num_attention_heads"]  # 4 of 10 features are rotated


def test_rotary_sections_and_factors_fit_the_small_head() -> None:
    factors = {"long_factor": [float(n) for n in range(64)], "short_factor": [1.0, 2.0], "factor": 8.0}
    rope = {"mrope_section": [16, 24, 24], **factors, "others": [1, 2]}
    real = {"hidden_size": 4096, "num_attention_heads": 32, "rope_parameters": rope}
    small = proportional_settings(real, tp=2, of_type={})["rope_parameters"]
    small_factors = {"long_factor": [0.0, 16.0, 32.0, 48.0], "short_factor": [1.0], "factor": 8.0}
    assert small == {"mrope_section": [1, 1, 2], **small_factors, "others": [1, 2]}


@pytest.mark.parametrize(
    ("real", "small"),
    [
        ({"layer_types": ["sliding"] * 5 + ["full"] * 7}, {"num_hidden_layers": 2, "layer_types": ["sliding", "full"]}),
        ({"mlp_only_layers": [3, 4]}, {"num_hidden_layers": 2, "mlp_only_layers": [1]}),
        ({"first_k_dense_replace": 3}, {"num_hidden_layers": 2, "first_k_dense_replace": 1}),
        ({"num_kv_shared_layers": 4}, {"num_hidden_layers": 2, "num_kv_shared_layers": 1}),
        ({"decoder_sparse_step": 4}, {"num_hidden_layers": 4}),
        ({"by_layer": {"05": {"head_dim": 512}}}, {"num_hidden_layers": 2, "by_layer": {1: {"head_dim": 16}}}),
        ({"sizes": [7] * 12}, {"num_hidden_layers": 2, "sizes": [7, 7]}),
        ({"layer_ids": list(range(12))}, {"num_hidden_layers": 2, "layer_ids": [0, 1]}),
        ({"skipped_layers": [True, False]}, {"num_hidden_layers": 2}),  # of something else: no indices
    ],
)
def test_every_kind_of_layer_stays(real: dict[str, object], small: dict[str, object]) -> None:
    assert proportional_settings({"num_hidden_layers": 12, **real}, tp=2, of_type={}) == small


def test_nothing_grows_and_what_is_unset_stays_unset() -> None:
    real = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "head_dim": None, "vocab_size": 50}
    assert proportional_settings(real, tp=2, of_type={}) == {name: real[name] for name in real if name != "head_dim"}
