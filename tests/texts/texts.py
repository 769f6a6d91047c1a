"""Collects every text of the source that a user can see, module by module.

    python tests/texts/texts.py          writes texts.txt, which is then read and committed with the change

A text is a string of two words or more that is not documentation of the code. Docstrings of commands count: `--help`
shows them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import tpcheck
from tpcheck.cli import app

SOURCE = Path(tpcheck.__file__).parent
GOLDEN = Path(__file__).with_name("texts.txt")
_WORDS = re.compile(r"[A-Za-z]{2,}[,:;.]? [A-Za-z{`'(]")
_CODE = re.compile(r"^(from|import|select|python) |^\s*@|<[a-z]+[ >]|\\b|^bold ")
_IDENTIFIER = re.compile(r"[a-z]+[_.][a-z_.]+|[A-Z0-9_]{3,}|torch\..*")
_COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}
_NOT_SHOWN = ("families/rules.py", "families/special_cases.py")  # words to search for; documentation of code


def texts() -> str:
    """Return all texts: a line each, under the path of their module."""
    parts = []
    for file in sorted(SOURCE.rglob("*.py")):
        if str(file.relative_to(SOURCE)) in _NOT_SHOWN:
            continue
        lines = list(dict.fromkeys(_texts_of(ast.parse(file.read_text()), is_command=file.parent.name == "cli")))
        if lines:
            parts.append("\n".join([str(file.relative_to(SOURCE)), *(f"    {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def _texts_of(tree: ast.Module, *, is_command: bool) -> Iterator[str]:
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    for node in ast.walk(tree):
        if id(node) in parts or id(node) in documentation:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif is_command and isinstance(node, ast.FunctionDef) and node.name in _COMMANDS:
            text = ast.get_docstring(node) or ""
        else:
            continue
        words = text.split()
        is_prose = 2 * sum(_IDENTIFIER.fullmatch(word) is not None for word in words) < len(words)
        if is_prose and _WORDS.search(" ".join(words)) and not _CODE.search(text):
            yield " ".join(words)


if __name__ == "__main__":
    GOLDEN.write_text(texts())
