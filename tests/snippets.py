"""The code in Markdown: its blocks, the commands in them, and what of their Python exists."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typer.main import get_command

from tpcheck.cli import app

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
_BLOCK = re.compile(r"(?:^<!-- test: ([^\n]+) -->\n)?^( *)```(\w+)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Snippet:
    """A block of code: its page, line, language and text; `test` is the comment `<!-- test: ... -->` above it."""

    page: Path
    line: int
    language: str
    text: str
    test: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The lines that start with `tpcheck`, with or without a prompt."""
        lines = [line.removeprefix("$ ") for line in self.text.splitlines()]
        return [line for line in lines if line.startswith("tpcheck ")]


def snippets(page: Path) -> list[Snippet]:
    """Return the blocks of a page in their order."""
    text = page.read_text()
    found = []
    for block in _BLOCK.finditer(text):
        test, indent, language, code = block.groups()
        line = text.count("\n", 0, block.start(4)) + 1
        found.append(Snippet(page, line, language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE), test))
    return found


def unknown_options(line: str) -> set[str]:
    """Return the options of `tpcheck COMMAND ...` that the command does not have."""
    _, command, *arguments = shlex.split(line, comments=True)
    if command.startswith("-"):
        return {command} - {"--version", "--help", "-h"}
    options = {name for parameter in COMMANDS[command].params for name in parameter.opts}
    return {argument for argument in arguments if argument.startswith("--")} - options


def names_that_do_not_exist(code: str) -> list[str]:
    """Return what the code imports, takes from `tpcheck` or passes to its functions, and is not there."""
    return [*_Names(ast.parse(code)).missing()]


class _Names:
    def __init__(self, tree: ast.AST) -> None:
        self._tree = tree
        self._values: dict[str, Any] = {"tpcheck": import_module("tpcheck")}

    def missing(self) -> Iterator[str]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if _is_missing(alias.name))
            elif isinstance(node, ast.ImportFrom) and node.module and _is_installed(node.module):
                yield from self._missing_of(node.module, [alias.name for alias in node.names])
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and self._value(node.value) is not None and self._value(node) is None:
                yield ast.unparse(node)
            if isinstance(node, ast.Call) and (function := self._value(node.func)) is not None:
                yield from (f"{ast.unparse(node.func)}({name}=)" for name in _unknown_keywords(function, node))

    def _missing_of(self, module: str, names: list[str]) -> Iterator[str]:
        if _is_missing(module):
            yield module
            return
        for name in names:
            value = getattr(import_module(module), name, None)
            if value is None and _is_missing(f"{module}.{name}"):
                yield f"{module}.{name}"
            if module.partition(".")[0] == "tpcheck":
                self._values[name] = value

    def _value(self, node: ast.AST) -> Any:
        """Return the value of a name of tpcheck, None for anything else."""
        if isinstance(node, ast.Name):
            return self._values.get(node.id)
        value = self._value(node.value) if isinstance(node, ast.Attribute) else None
        if value is None or not isinstance(node, ast.Attribute):
            return None
        if value is _NOT_LOADED:
            return value
        member = getattr(value, node.attr, None) if inspect.ismodule(value) or inspect.isclass(value) else None
        return _module(f"{value.__name__}.{node.attr}") if member is None and inspect.ismodule(value) else member


def _unknown_keywords(function: Any, call: ast.Call) -> set[str]:
    if function is _NOT_LOADED:
        return set()
    parameters = inspect.signature(function).parameters
    given = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return set() if takes_any else given - set(parameters)


def _is_installed(module: str) -> bool:
    return find_spec(module.partition(".")[0]) is not None


def _is_missing(module: str) -> bool:
    """Return whether the package is installed and has no such module."""
    if not _is_installed(module):
        return False
    try:
        return find_spec(module) is None
    except ImportError:
        return True


def _module(name: str) -> Any:
    """Return a module, None if there is none; `_NOT_LOADED` stands for one that needs an extra."""
    if _is_missing(name):
        return None
    try:
        return import_module(name)
    except ImportError:
        return _NOT_LOADED


_NOT_LOADED = object()
