"""The schema of what `--json` writes: it is one, and the examples of the documentation follow it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.schema import document, schema

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
_EXAMPLE = re.compile(r"^## [^\n]*\(`(\w+)`\)$.*?^```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = _EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
KINDS = [each["$ref"].rpartition("/")[2] for each in schema()["oneOf"]]


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(schema())
    assert all(definition.get("description") for definition in schema()["$defs"].values())


@pytest.mark.parametrize(("kind", "example"), EXAMPLES, ids=[kind for kind, _ in EXAMPLES])
def test_an_example_of_the_documentation_follows_it(kind: str, example: str) -> None:
    document(example, kind)


def test_the_documentation_has_an_example_of_each_document() -> None:
    assert set(KINDS) == {kind for kind, _ in EXAMPLES}


@pytest.mark.parametrize("change", [{"verdict": "fine"}, {"schema": 2}, {"extra": 1}, {"seconds": None}])
def test_another_document_does_not_follow_it(change: dict[str, Any]) -> None:
    example = next(json.loads(text) for kind, text in EXAMPLES if kind == "report")
    assert not Draft202012Validator(schema()).is_valid({**example, **change})
