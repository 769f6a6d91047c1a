"""`--set KEY=VALUE` reaches every attribute, and a wrong key says what was near."""

from __future__ import annotations

import pytest

from tpcheck.core.errors import UsageError
from tpcheck.families.settings import nest, overlay, unknown


def test_dots_reach_nested_settings() -> None:
    assert nest({"a.b.c": 1, "a.b.d": 2, "e": 3}) == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}


@pytest.mark.parametrize("settings", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}])
def test_a_key_cannot_be_a_value_and_a_parent(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="not both"):
        nest(settings)


def test_an_overlay_changes_only_the_keys_that_it_names() -> None:
    base = {"rope": {"type": "default", "theta": 1e4}, "heads": 8}
    assert overlay(base, {"rope": {"theta": 1e6}}) == {"rope": {"type": "default", "theta": 1e6}, "heads": 8}
    assert base["rope"] == {"type": "default", "theta": 1e4}


def test_an_unknown_name_is_answered_with_its_neighbours() -> None:
    assert unknown("a family", "lama", ["llama", "opt"]) == "a family; did you mean llama?"
    assert unknown("a family", "zzz", ["llama", "opt"]) == "a family"
