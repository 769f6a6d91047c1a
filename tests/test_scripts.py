"""Scripts under ci/, and functions of tests, import names that exist: nothing else would notice before they run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield (script, module, name) for every name of tpcheck that a Python file imports, inside functions, too."""
    files = (path for folder in ("ci", "tests") for path in (ROOT / folder).rglob("*") if path.is_file())
    for script in sorted(path for path in files if "__pycache__" not in path.parts):
        if script.suffix not in ("", ".py"):
            continue
        text = script.read_text()
        if not script.suffix and not text.startswith("#!/usr/bin/env python"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tpcheck":
                yield from ((str(script.relative_to(ROOT)), str(node.module), alias.name) for alias in node.names)


def test_every_name_that_is_imported_exists() -> None:
    missing = []
    for script, module, name in imports():
        if module.endswith("lightning"):
            continue  # an extra that may be missing; its tests are skipped then
        try:
            found = hasattr(import_module(module), name) or import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(f"{script}: {module}.{name}")
    assert missing == []
