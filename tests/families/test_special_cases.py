"""Each special case has a reason and a source, and code that uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tpcheck
from tpcheck.families import special_cases
from tpcheck.families.special_cases import SpecialCase

ROWS = {name: row for name, row in vars(special_cases).items() if isinstance(row, SpecialCase)}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_names_models_a_reason_and_a_link(name: str) -> None:
    row = ROWS[name]
    assert row.models
    assert row.reason.endswith(".")
    assert "https://" in row.source


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_used_by_the_code_that_it_is_for(name: str) -> None:
    folder = Path(tpcheck.__file__).parent
    sources = (path for path in folder.rglob("*.py") if path.name != "special_cases.py")
    assert any(name in source.read_text() for source in sources)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ("VOCABULARY_PARAMETER", "lm_head.weight model.embed_tokens.weight transformer.wte.weight shared.weight"),
        (
            "FUSED_PARAMETER",
            "attn.c_attn.weight attention.query_key_value.bias mlp.gate_up_proj.weight linear_fc1.weight",
        ),
        (
            "KEY_OR_VALUE_PROJECTION",
            "self_attn.k_proj self_attn.v_proj attention.self.key attention.k_lin SelfAttention.v",
        ),
        ("QUERY_PROJECTION", "self_attn.q_proj attention.self.query attention.q_lin SelfAttention.q"),
    ],
)
def test_names_of_real_models_match(row: str, names: str) -> None:
    assert all(ROWS[row].matches(name) for name in names.split())


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ("VOCABULARY_PARAMETER", "model.norm.weight new_lm_heads.weight mlp.shared_expert.weight"),
        ("FUSED_PARAMETER", "self_attn.q_proj.weight mlp.up_proj.weight mlp.down_proj.weight"),
        ("KEY_OR_VALUE_PROJECTION", "self_attn.q_proj self_attn.o_proj mlp.up_proj"),
        ("QUERY_PROJECTION", "self_attn.k_proj self_attn.qkv_proj"),
        ("MEGATRON_LABEL_SMOOTHING", "model.decoder.layers.0"),
    ],
)
def test_other_names_do_not_match(row: str, names: str) -> None:
    assert not any(ROWS[row].matches(name) for name in names.split())
