"""Small configurations follow from attribute names alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.families.rules import HEADS, KV_HEADS, SIZES, VOCABULARY, layers_to_keep, small_settings

KINDS = st.lists(st.sampled_from(["full", "sliding", "linear"]), min_size=1, max_size=40)


def test_widths_heads_and_layers_shrink_and_flags_stay() -> None:
    small = small_settings({"hidden_size": 4096, "num_hidden_layers": 32, "attention_bias": True, "rms_norm_eps": 1e-5})
    assert small == {"hidden_size": 64, "num_hidden_layers": 2}


def test_every_dropout_is_off() -> None:
    small = small_settings(
        {"attn_pdrop": 0.1, "hidden_dropout_prob": 0.1, "router_jitter_noise": 0.01, "use_cache": True}
    )
    assert small == {"attn_pdrop": 0.0, "hidden_dropout_prob": 0.0, "router_jitter_noise": 0.0, "use_cache": False}


def test_an_attribute_that_a_type_does_not_have_or_leaves_unset_is_not_invented() -> None:
    assert small_settings({"sliding_window": None, "q_lora_rank": None}) == {}


def test_special_tokens_move_into_the_vocabulary_and_those_of_other_media_stay_out_of_its_reach() -> None:
    small = small_settings(
        {"pad_token_id": 128001, "bos_token_id": 2, "eos_token_id": [128008], "image_token_id": 128256}
    )
    assert small == {"pad_token_id": 0, "eos_token_id": [2]}


def test_mla_keeps_a_key_and_value_for_every_head() -> None:
    assert small_settings({"num_key_value_heads": 32})["num_key_value_heads"] == KV_HEADS
    assert small_settings({"num_key_value_heads": 32, "kv_lora_rank": 512})["num_key_value_heads"] == HEADS


def test_lists_of_layer_indices_are_left_to_the_type() -> None:
    assert small_settings({"num_hidden_layers": 3, "moe_layers": [0, 1, 2]}) == {"num_hidden_layers": 2}


@given(KINDS)
def test_every_kind_of_layer_is_kept(kinds: list[str]) -> None:
    kept = layers_to_keep({"layer_types": kinds})
    assert {kinds[index] for index in kept} == set(kinds)
    assert len(kept) == max(2, len(set(kinds)))


@given(KINDS, st.integers(1, 12))
def test_as_many_layers_are_kept_as_wanted(kinds: list[str], wanted: int) -> None:
    assert len(layers_to_keep({"layer_types": kinds}, wanted)) == wanted


def test_kinds_are_combinations_over_all_per_layer_lists() -> None:
    kept = layers_to_keep(
        {"layer_types": ["sliding", "full", "sliding"], "mlp_layer_types": ["dense", "sparse", "sparse"]}
    )
    assert kept == [0, 1, 2]


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"])
def test_sizes_are_cut_evenly_by_tp_2_and_tp_4(name: str) -> None:
    assert SIZES[name] % 4 == 0
    assert VOCABULARY % 4 == 0
