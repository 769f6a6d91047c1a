"""A verdict as JSON of schema 1."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set, ValuesView
from math import isfinite, prod
from pathlib import PurePath
from typing import Any

from tpcheck.core.findings import CheckResult, Finding, ModuleMargins, Verdict

SCHEMA = 1
_FINDING_KEYS = ("check", "where", "observed", "allowed", "margin", "cause", "evidence", "again")
_CHECK_KEYS = ("check", "compared", "worst_margin", "worst_at")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_DEEPEST = 100  # nested containers; deeper ones are left out
_LARGEST_ARRAY = 64  # elements; larger tensors and arrays are described by shape and dtype


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain JSON values. Infinities and NaN become null."""
    return {
        "schema": SCHEMA,
        "verdict": verdict.verdict,
        "subject": plain_json(verdict.subject),
        "environment": plain_json(verdict.environment),
        "findings": [_fields(finding, _FINDING_KEYS) for finding in verdict.findings],
        "checks": [
            {
                **_fields(check, _CHECK_KEYS),
                **({"compared_only": check.compared_only} if check.compared_only else {}),
            }
            for check in verdict.checks
        ],
        "margins": _margins(verdict.modules),
        "coverage": {
            "compared": verdict.coverage.compared,
            "total": verdict.coverage.total,
            "missed": plain_json(verdict.coverage.not_compared),
        },
        "message": verdict.message,
        **({"notes": list(verdict.notes)} if verdict.notes else {}),
        "seconds": plain_json(verdict.seconds),
    }


_SIGNIFICANT = 4  # digits of a module's margin


def _margins(modules: Sequence[ModuleMargins]) -> dict[str, dict[str, float | None]]:
    """Return the margins by phase and module, without modules of which nothing was compared; infinity becomes null."""
    has_weights = any(each.weights is not None for each in modules)
    return {
        phase: {
            each.module: float(f"{margin:.{_SIGNIFICANT}g}") if isfinite(margin) else None
            for each in modules
            if (margin := getattr(each, phase)) is not None
        }
        for phase in ("forward", "backward", *(("weights",) if has_weights else ()))
    }


_NUMBERS = re.compile(r"\[\s+((?:(?:-?\d[\d.eE+-]*|null),?\s+)+)\]")


def json_text(data: Any, *, indent: int = 2) -> str:
    """Return plain JSON values as indented text, lists of numbers in one line.

    Example:
        >>> print(json_text({"tiles": [[0.5, None], [1, 2]]}))
        {
          "tiles": [
            [0.5, null],
            [1, 2]
          ]
        }
    """
    text = json.dumps(data, indent=indent, allow_nan=False)
    return _NUMBERS.sub(lambda numbers: f"[{' '.join(numbers[1].split())}]", text)  # no text holds a line break


def _fields(record: Finding | CheckResult, keys: Sequence[str]) -> dict[str, Any]:
    return {key: plain_json(getattr(record, key)) for key in keys}


def plain_json(value: Any) -> Any:
    """Return a value as plain JSON values; never raises.

    Infinities and NaN become null; keys, and values that JSON cannot represent, become text.

    Example:
        >>> plain_json({"sizes": (1, 2), 3: float("inf"), "dtype": float, "step": lambda: None})
        {'sizes': [1, 2], '3': None, 'dtype': "<class 'float'>", 'step': '<function <lambda>>'}
    """
    return _plain(value, (), lambda number: None)


def printable(value: Any) -> Any:
    """Return a value as `plain_json` does, but keep infinities and NaN; never raises."""
    return _plain(value, (), lambda number: number)


def plain_text(value: Any) -> str:
    """Return a value as text that names its type and is the same in every run: no memory addresses; never raises.

    Example:
        >>> plain_text(object()), plain_text(float)
        ('<object object>', "<class 'float'>")
    """
    if isinstance(value, (str, PurePath)):
        return str(value)
    kind = type(value).__name__
    try:
        text, representation = (_ADDRESS.sub("", form) for form in (str(value), repr(value)))
    except Exception:  # raised by the value's class
        return f"<{type(value).__module__}.{type(value).__qualname__} object>"
    return text if text == representation or kind in text else f"{kind}({text})"


def _plain(value: Any, around: tuple[int, ...], not_finite: Callable[[float], float | None]) -> Any:
    """Return a value as plain JSON values; `around` holds the ids of the containers that it is in."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else not_finite(value)
    if isinstance(value, (bytes, bytearray, memoryview, type)):
        return plain_text(value)
    if id(value) in around or len(around) == _DEEPEST:
        return "..."

    def inside(inner: Any) -> Any:
        return _plain(inner, (*around, id(value)), not_finite)

    try:
        if isinstance(value, Mapping):
            return _mapping(value, inside)
        if hasattr(value, "tolist"):  # a tensor, an array, a scalar of NumPy
            size = prod(value.shape)
            return inside(value.tolist()) if size <= _LARGEST_ARRAY else _array_text(value)
        if isinstance(value, Set):
            return _sorted([inside(inner) for inner in value])
        return [inside(inner) for inner in value] if isinstance(value, (Sequence, ValuesView)) else plain_text(value)
    except Exception:  # raised by the value's class
        return plain_text(value)


def _mapping(value: Mapping[Any, Any], inside: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a mapping with text keys; equal texts of different keys get the type appended."""
    plain: dict[str, Any] = {}
    for key, inner in value.items():
        name = plain_text(key)
        while name in plain:
            name += f" ({type(key).__name__})"
        plain[name] = inside(inner)
    return plain


def _sorted(values: list[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:  # of several types
        return sorted(values, key=lambda value: json.dumps(value, sort_keys=True))


def _array_text(value: Any) -> str:
    return f"{type(value).__name__} of shape {list(value.shape)}, {value.dtype}"
