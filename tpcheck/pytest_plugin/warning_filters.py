"""Warnings on ranks: filtered as pytest filters them, kept, and given again in pytest's process."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from typing import Any

from tpcheck.pytest_plugin.messages import RankWarning, WarningFilter


def current_filters() -> tuple[WarningFilter, ...]:
    """Return the filters that hold here and now: while a test runs, those of pytest, its options and marks."""
    return tuple(
        WarningFilter(action, _pattern(message), (category.__module__, category.__qualname__), _pattern(module), lineno)
        for action, message, category, module, lineno in warnings.filters
        if isinstance(category, type)  # a tuple only where somebody wrote to the list by hand
    )


@contextmanager
def kept_warnings(filters: Iterable[WarningFilter]) -> Iterator[list[warnings.WarningMessage]]:
    """Apply the filters, and collect the warnings that pass them."""
    with warnings.catch_warnings(record=True) as log:
        warnings.resetwarnings()
        for one in filters:
            category = _category(one.category, import_it=True)
            if category is not None:
                action: Any = one.action  # a Literal to mypy; it came out of `warnings` itself
                warnings.filterwarnings(action, one.message, category, one.module, one.lineno, append=True)
        yield log


def as_messages(log: Iterable[warnings.WarningMessage]) -> tuple[RankWarning, ...]:
    return tuple(
        RankWarning(
            (entry.category.__module__, entry.category.__qualname__), str(entry.message), entry.filename, entry.lineno
        )
        for entry in log
    )


def give_again(given: Iterable[RankWarning]) -> None:
    """Warn here of what ranks warned of, once where several said the same."""
    for warning in dict.fromkeys(given):
        category = _category(warning.category, import_it=False)
        text = warning.message if category else f"{warning.category[1]}: {warning.message}"
        warnings.warn_explicit(text, category or UserWarning, warning.filename, warning.lineno)


def _category(name: tuple[str, str], *, import_it: bool) -> type[Warning] | None:
    """Return the class; pytest's process does not import a module (torch, say) for the name of a warning."""
    module, qualname = name
    try:
        found = import_module(module) if import_it else sys.modules[module]
        category = reduce(getattr, qualname.split("."), found)
    except Exception:
        return None
    return category if isinstance(category, type) and issubclass(category, Warning) else None


def _pattern(pattern: Any) -> str:
    """Return the regular expression as text; `warnings` keeps None, a string or a compiled one."""
    if pattern is None:
        return ""
    return pattern if isinstance(pattern, str) else str(pattern.pattern)
