"""Every causal model type of transformers builds small, and its dimensions can be varied."""

from __future__ import annotations

import pytest

from tpcheck.core.errors import UsageError
from tpcheck.families import known
from tpcheck.families.build import HEADS, causal_types, dimensions, small_config, small_model, types_of
from tpcheck.families.rules import OVERRIDES

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


# Why each is not built, of the 189 types of transformers 5.23.
UNBUILDABLE = {
    "gemma3n",  # its vision tower needs pillow and timm
    "gemma4_assistant",  # reads the keys and values of another model
    "gemma4_unified_assistant",  # reads the keys and values of another model
    "musicgen",  # transformers hands the decoder the composite configuration
    "musicgen_melody",  # transformers hands the decoder the composite configuration
}


@pytest.mark.parametrize("family", known())
def test_a_known_family_trains_in_float64_and_is_cut_evenly_eager_and_without_dropout(family: str) -> None:
    torch.manual_seed(0)
    model = small_model(family).double()
    tokens_BL = torch.randint(model.config.vocab_size, (2, 16))
    loss = model(input_ids=tokens_BL, labels=tokens_BL).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    config = model.config
    assert config.num_attention_heads % 4 == 0
    assert config.vocab_size % 4 == 0
    assert config._attn_implementation == "eager"
    assert config.use_cache is False
    assert {name: value for name, value in config.to_dict().items() if "drop" in name and value} == {}


def test_nearly_every_causal_type_is_built() -> None:
    with torch.device("meta"):
        assert {family for family in causal_types() if not is_built(family)} <= UNBUILDABLE


def is_built(family: str) -> bool:
    try:
        small_model(family)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("nemotron_h", {"linear_attention", "moe", "mlp", "full_attention"}),
    ],
)
def test_every_kind_of_layer_of_a_type_is_kept(family: str, kinds: set[str]) -> None:
    assert set(small_config(family).layer_types) == kinds


def test_the_seed_decides_the_weights() -> None:
    def weight(seed: int) -> object:
        torch.manual_seed(seed)
        return next(small_model("llama").parameters())

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_settings_change_the_small_configuration() -> None:
    config = small_config("phi", {"qk_layernorm": True, "num_hidden_layers": 3})
    assert (config.qk_layernorm, config.num_hidden_layers, config.hidden_size) == (True, 3, 64)


def test_settings_reach_aliases_dictionaries_and_nested_configurations() -> None:
    assert small_config("gpt2", {"num_hidden_layers": 3}).n_layer == 3
    assert small_config("llama", {"rope_parameters.rope_theta": 5.0}).rope_parameters == {
        "rope_theta": 5.0,
        "rope_type": "default",
    }
    assert small_config("gemma3", {"text_config.head_dim": 4}).text_config.head_dim == 4


def test_wanted_layers_keep_the_pattern_of_kinds() -> None:
    config = small_config("gemma3_text", {"num_hidden_layers": 4})
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2


def test_an_unknown_family_names_its_neighbours() -> None:
    with pytest.raises(UsageError) as error:
        small_model("lama")
    assert str(error.value) == (
        "family='lama': expected a language model type of transformers; did you mean llama or mllama or llama4?\n"
        "read on: https://github.com/tpcheck/tpcheck/tree/main/docs/guides/which-models.md"
    )


def test_an_unknown_setting_names_its_neighbours() -> None:
    with pytest.raises(UsageError) as error:
        small_model("llama", {"num_layer": 3})
    assert str(error.value) == (
        "set='num_layer': expected an attribute of LlamaConfig; did you mean num_hidden_layers?"
    )


def test_settings_that_cannot_be_built_give_the_family_s_own_reason() -> None:
    with pytest.raises(UsageError, match=r"family='llama': expected settings that it can be built from .*heads"):
        small_model("llama", {"hidden_size": 65})


def test_every_override_is_of_a_type_that_transformers_has() -> None:
    assert set(OVERRIDES) <= {family for head in HEADS for family in types_of(head)}


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


@pytest.mark.parametrize("family", ["glm4v_moe", "hunyuan_vl", "paddleocr_vl", "granite_docling", "unlimited_ocr"])
def test_a_multimodal_type_trains_on_text(family: str) -> None:
    if not any(family in types_of(head) for head in HEADS):
        pytest.skip("not in this version of transformers")
    model = small_model(family)
    tokens_BL = torch.randint(model.config.get_text_config().vocab_size, (2, 16))
    model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()


def test_sections_of_rotary_embeddings_fit_the_heads() -> None:
    def sections(**settings: object) -> object:
        config = small_config("qwen2_vl", {f"text_config.{name}": value for name, value in settings.items()})
        return config.text_config.rope_parameters.get("mrope_section")

    assert sections() == [1, 1, 2]
    assert sections(num_attention_heads=4) == [2, 2, 4]
    assert sections(num_attention_heads=16) is None  # two pairs of features
    assert sections(rope_parameters={"mrope_section": [2, 1, 1]}) == [2, 1, 1]
    assert sections(rope_parameters={"rope_theta": 1e4}) == [1, 1, 2]
