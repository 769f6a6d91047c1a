"""Documents of `--json` are held against the schema in the wheel, wherever a test makes one."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator


@cache
def schema() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((files("tpcheck.report") / "schema.json").read_text(encoding="utf-8"))
    return data


@cache
def _validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator({**schema(), "oneOf": [{"$ref": f"#/$defs/{kind}"}]})


def document(source: str | Path, kind: str) -> Any:
    """Return the document in a text or file, which must be of this kind, and of no other."""
    data = json.loads(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    errors = [error for found in _validator(kind).iter_errors(data) for error in (found.context or [found])]
    assert not errors, [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]
    assert Draft202012Validator(schema()).is_valid(data), f"the document is of several kinds, not of {kind} alone"
    return data
