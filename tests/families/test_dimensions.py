"""The dimensions of a family are read from its configuration."""

import pytest

from tpcheck.families.build import small_config
from tpcheck.families.dimensions import dimensions


def test_a_role_has_the_names_that_the_family_gives_it() -> None:
    assert dimensions("gpt2").names["heads"] == ("n_head",)
    assert dimensions("gemma3").names["heads"] == ("text_config.num_attention_heads",)
    assert set(dimensions("opt").names["hidden"]) == {"hidden_size", "word_embed_proj_dim"}


def test_switches_are_those_that_the_family_declares() -> None:
    assert dimensions("llama").switches == {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    assert "qk_layernorm" in dimensions("phi").switches


def test_every_special_token_is_in_the_smallest_vocabulary() -> None:
    assert dimensions("llama").least_vocabulary == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "gemma3"])
def test_drawn_sizes_reach_the_configuration(family: str) -> None:
    drawn = dimensions(family).settings({"layers": 3, "vocabulary": 33})
    text = small_config(family, drawn).get_text_config()
    assert (text.num_hidden_layers, text.vocab_size) == (3, 33)
