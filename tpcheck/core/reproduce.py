"""The commands that repeat a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any


def verify_command(family: str, options: Mapping[str, Any]) -> str | None:
    """Return `tpcheck verify FAMILY` with these options, by the names of their flags; `settings` become `--set`.

    None where an option holds what JSON does not, such as an object: no command can repeat it.

    Example:
        >>> verify_command("phi", {"tp": 2, "settings": {"qk_layernorm": True}, "ignore_plan": True})
        'tpcheck verify phi --tp 2 --set qk_layernorm=true --ignore-plan'
    """
    words = ["tpcheck", "verify", family]
    try:
        for name, value in options.items():
            if name == "settings":
                words += _flag("set", [f"{key}={json.dumps(_as_json(inner))}" for key, inner in value.items()])
            else:
                words += _flag(name, value)
    except (TypeError, RecursionError):
        return None
    return shlex.join(words)


def checkpoint_command(
    paths: Sequence[str] | None,
    dtype: str | None,
    earlier: Sequence[str] | None,
    allow_pickle: bool,
    *,
    weights_only: bool = False,
    maps: Sequence[str] = (),
) -> str | None:
    """Return `tpcheck checkpoint ACTUAL REFERENCE ...`, or None where something compared was no file or folder.

    Example:
        >>> checkpoint_command(["saved", "reference"], "bfloat16", [], False)
        'tpcheck checkpoint saved reference --dtype bfloat16'
    """
    if paths is None or earlier is None:
        return None
    options = [*_flag("dtype", dtype), *_flag("earlier", earlier), *_flag("allow_pickle", allow_pickle)]
    options += [*_flag("weights_only", weights_only), *_flag("map", list(maps))]
    return shlex.join(["tpcheck", "checkpoint", *paths, *options])


def compare_command(actual: str, expected: str, maps: Sequence[str] = ()) -> str:
    """Return the command that compares two traces, with the maps of names that were used.

    Example:
        >>> compare_command("a.trace", "b.trace", ["hf-megatron"])
        'tpcheck compare a.trace b.trace --map hf-megatron'
    """
    return shlex.join(["tpcheck", "compare", actual, expected, *_flag("map", list(maps))])


def _flag(name: str, value: Any) -> list[str]:
    """Return the words of an option: none for None and False, a bare flag for True, a flag for each item of a list.

    Raises:
        TypeError: The value is a mapping that JSON cannot hold, or a function.
    """
    if callable(value):
        raise TypeError(type(value).__name__)
    flag = f"--{name.replace('_', '-')}"
    if value is None or isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, Mapping):
        return [flag, json.dumps(_as_json(value))]
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in (flag, str(item))]
    return [flag, str(value)]


def _as_json(value: Any) -> Any:
    """Return a value as it comes back from JSON, except that tuples become lists.

    Raises:
        TypeError: JSON has no such value, or no such key of a mapping.
    """
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(type(value).__name__)
