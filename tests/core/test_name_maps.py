"""Names of one run in the words of another's."""

from __future__ import annotations

import re

import pytest

import tpcheck
from tpcheck.core.errors import UsageError
from tpcheck.core.name_maps import NameMap, parse_maps


def test_a_pattern_renames_the_actual_run_alone() -> None:
    names = parse_maps([r"^net\.(\d+)=model.layers.\1"])
    assert names.renamed("net.3.weight", is_actual=True) == "model.layers.3.weight"
    assert names.renamed("net.3.weight", is_actual=False) == "net.3.weight"


def test_the_last_equals_sign_separates_pattern_and_replacement() -> None:
    assert parse_maps(["a(?=b)=x"]).renamed("ab", is_actual=True) == "xb"


@pytest.mark.parametrize(
    ("megatron", "transformers"),
    [
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("decoder.layers.0.self_attention.linear_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("decoder.layers.1.mlp.linear_fc2", "model.layers.1.mlp.down_proj"),
        ("decoder.layers.1.pre_mlp_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "model.layers.1.input_layernorm.weight"),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ],
)
def test_the_map_of_megatron_gives_the_names_of_transformers(megatron: str, transformers: str) -> None:
    names = parse_maps(["hf-megatron"])
    assert names.renamed(megatron, is_actual=True) == transformers
    assert names.renamed(megatron, is_actual=False) == transformers
    assert names.renamed(transformers, is_actual=True) == transformers


def test_fused_parameters_have_parts() -> None:
    names = parse_maps(["hf-megatron"])
    fused = names.renamed("decoder.layers.0.self_attention.linear_qkv.weight", is_actual=True)
    assert names.fused_from(fused) == tuple(f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv")
    assert names.fused_from("model.norm.weight") == ()


@pytest.mark.parametrize("value", ["hf-megatrom", "([=x", r"a=\1"])
def test_a_map_that_is_none_is_refused_with_what_is_accepted(value: str) -> None:
    with pytest.raises(UsageError, match=re.escape("map=")):
        parse_maps([value]).renamed("a", is_actual=True)


def test_without_patterns_names_stay() -> None:
    assert NameMap().renamed("model.norm.weight", is_actual=True) == "model.norm.weight"


@pytest.mark.parametrize("names", [3, "hf-megatron"])
def test_names_that_are_no_map_are_refused(names: object) -> None:
    with pytest.raises(UsageError, match="names of ready maps"):
        tpcheck.compare_traces("a", "b", names=names)  # type: ignore[arg-type]


def test_a_pattern_is_idle_only_where_no_name_has_it_after_those_before() -> None:
    names = parse_maps(["^net=core", "^core=model", "^net[.]=x"])
    assert names.idle_pattern(["net.0.weight"]) == "^net[.]=x"
    assert parse_maps(["^net=core", "^core=model"]).idle_pattern(["net.0.weight"]) is None
