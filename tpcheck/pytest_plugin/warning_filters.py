"""Warnings on ranks: filtered as pytest filters them, recorded, and issued again in pytest's process."""

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
    """Return the filters in effect: while a test runs, those of pytest, its options and marks."""
    return tuple(
        WarningFilter(action, _pattern(message), (category.__module__, category.__qualname__), _pattern(module), lineno)
        for action, message, category, module, lineno in warnings.filters
        if isinstance(category, type)  # a tuple only where code appended to the list itself
    )


@contextmanager
def recorded_warnings(filters: Iterable[WarningFilter]) -> Iterator[list[warnings.WarningMessage]]:
    """Apply the filters, and record the warnings that pass them."""
    with warnings.catch_warnings(record=True) as log:
        warnings.resetwarnings()
        for entry in filters:
            category = _category(entry.category, may_import=True)
            if category is not None:
                action: Any = entry.action  # a Literal to mypy, a str in `warnings.filters`
                warnings.filterwarnings(action, entry.message, category, entry.module, entry.lineno, append=True)
        yield log


def as_rank_warnings(log: Iterable[warnings.WarningMessage]) -> tuple[RankWarning, ...]:
    return tuple(
        RankWarning(
            (entry.category.__module__, entry.category.__qualname__), str(entry.message), entry.filename, entry.lineno
        )
        for entry in log
    )


def reissue_warnings(rank_warnings: Iterable[RankWarning]) -> None:
    """Issue the warnings of ranks in this process, each once however many ranks issued it."""
    for warning in dict.fromkeys(rank_warnings):
        category = _category(warning.category, may_import=False)
        text = warning.message if category else f"{warning.category[1]}: {warning.message}"
        warnings.warn_explicit(text, category or UserWarning, warning.filename, warning.lineno)


def _category(name: tuple[str, str], *, may_import: bool) -> type[Warning] | None:
    """Return the class; pytest's process imports no module (torch, say) to find the class of a warning."""
    module, qualname = name
    try:
        holder = import_module(module) if may_import else sys.modules[module]
        category = reduce(getattr, qualname.split("."), holder)
    except Exception:
        return None
    return category if isinstance(category, type) and issubclass(category, Warning) else None


def _pattern(pattern: Any) -> str:
    """Return the regular expression as text; `warnings.filters` contains None, a string or a compiled pattern."""
    if pattern is None:
        return ""
    return pattern if isinstance(pattern, str) else str(pattern.pattern)
