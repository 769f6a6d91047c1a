"""What installed packages define, read from their source: to import torch or transformers takes seconds."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

# Python 3.11 counts how deep its parser is for all threads together, and raises SystemError where a garbage collection
# lets one parse while another does: https://github.com/python/cpython/issues/106905
_PARSER = Lock()


def imported_names(module: str) -> tuple[tuple[str, str], ...]:
    """Return what a module imports by name, as (module, name).

    Example:
        >>> ("torch.optim.sgd", "SGD") in imported_names("torch.optim")
        True
    """
    return tuple(
        (node.module, alias.name)
        for node in _tree(module).body
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    )


def bases_of(module: str, name: str) -> tuple[str, ...]:
    """Return the names of the base classes of a class in a module; none if there is no such class."""
    found = _class(module, name)
    return () if found is None else tuple(base.id for base in found.bases if isinstance(base, ast.Name))


def parameters_of(module: str, name: str) -> tuple[str, ...] | None:
    """Return the parameters that the constructor of a class takes, without `self`.

    None where they are not known: there is no such class here, it has no constructor of its own, or takes any keyword.

    Example:
        >>> parameters_of("torch.optim.sgd", "SGD")[:3]
        ('params', 'lr', 'momentum')
    """
    found = _class(module, name)
    methods = [] if found is None else [node for node in found.body if isinstance(node, ast.FunctionDef)]
    constructor = next((method for method in methods if method.name == "__init__"), None)
    if constructor is None or constructor.args.kwarg is not None:
        return None
    arguments = constructor.args
    return tuple(each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))[1:]


def fields_of(module: str, name: str) -> tuple[str, ...]:
    """Return the annotated fields of a class, as a dataclass has them; none if there is no such class here."""
    found = _class(module, name)
    return () if found is None else tuple(_annotated(found.body))


def keys_of(module: str, name: str) -> tuple[str, ...]:
    """Return the texts that the value of a constant contains as keys, or as first items of pairs; none without one."""
    return tuple(
        dict.fromkeys(
            item.value
            for node in _tree(module).body
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node) and node.value is not None
            for item in _first_items(node.value)
            if isinstance(item, ast.Constant) and isinstance(item.value, str)
        )
    )


def _class(module: str, name: str) -> ast.ClassDef | None:
    return next((node for node in _tree(module).body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _annotated(body: list[ast.stmt]) -> Iterator[str]:
    return (node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _first_items(value: ast.expr) -> Iterator[ast.expr | None]:
    for node in ast.walk(value):
        if isinstance(node, ast.Dict):
            yield from node.keys
        elif isinstance(node, ast.List):
            yield from (item.elts[0] for item in node.elts if isinstance(item, ast.Tuple) and item.elts)


@lru_cache
def _tree(module: str) -> ast.Module:
    """Return the source of a module; an empty one where it has none, or is not installed."""
    path = _path(module)
    try:
        text = "" if path is None else path.read_text(encoding="utf-8")
        with _PARSER:
            return ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _path(module: str) -> Path | None:
    """Return the file of a module. `find_spec` of a submodule would import the packages above it."""
    package, *parts = module.split(".")
    try:
        spec = find_spec(package) if package not in sys.modules else sys.modules[package].__spec__
    except (ImportError, ValueError):
        return None
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    inside = [Path(folder, *parts) for folder in folders]
    candidates = [path for each in inside for path in (each.with_suffix(".py"), each / "__init__.py")]
    return next((path for path in candidates if path.is_file()), None)
