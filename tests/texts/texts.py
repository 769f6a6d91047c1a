"""Collects every text of the source that a user can see, module by module.

    python tests/texts/texts.py          writes texts.txt, which is then read and committed with the change

A text is a string of two words or more that is no docstring; docstrings of commands count, since `--help` shows them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import tpcheck

SOURCE = Path(tpcheck.__file__).parent
GOLDEN = Path(__file__).with_name("texts.txt")
_WORDS = re.compile(r"[A-Za-z]{2,}[,:;.]? [A-Za-z{`'(]")
_CODE = re.compile(r"^(from|import|select|python) |^\s*@|<[a-z]+[ >]|\\b")


def texts() -> str:
    """Return all texts: a line each, under the path of their module."""
    parts = []
    for file in sorted(SOURCE.rglob("*.py")):
        lines = list(dict.fromkeys(_texts_of(ast.parse(file.read_text()), is_command=file.parent.name == "cli")))
        if lines:
            parts.append("\n".join([str(file.relative_to(SOURCE)), *(f"    {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def _texts_of(tree: ast.Module, *, is_command: bool) -> Iterator[str]:
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}  # type: ignore[attr-defined]
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value
        elif is_command and isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
        else:
            continue
        text = " ".join(text.split())
        if _WORDS.search(text) and not _CODE.search(text):
            yield text


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


if __name__ == "__main__":
    GOLDEN.write_text(texts())
