"""The scripts under ci/ import names that exist; they are run by hand, so nothing else would notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

CI = Path(__file__).parents[1] / "ci"


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield (script, module, name) for every name of tpcheck that a Python script imports, inside functions, too."""
    for script in sorted(path for path in CI.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        text = script.read_text()
        if script.suffix != ".py" and not text.startswith("#!/usr/bin/env python"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tpcheck":
                yield from ((script.name, str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize(("script", "module", "name"), list(imports()))
def test_a_name_that_a_script_imports_exists(script: str, module: str, name: str) -> None:
    if not hasattr(import_module(module), name):
        import_module(f"{module}.{name}")
