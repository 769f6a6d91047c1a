"""The commands that repeat a verification."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_DEFAULTS = {"backend": "deepspeed", "tp": None, "dp": 1, "zero": 0, "dtype": "float64", "steps": 2, "seed": 0}


def verify_command(subject: Mapping[str, Any]) -> str | None:
    """Return `tpcheck verify ...` for the subject of a report; options at their defaults are left out.

    None where a setting or the configuration holds what JSON does not, such as an object: no command can repeat it.

    Example:
        >>> verify_command({"family": "phi", "tp": 2, "dp": 1, "settings": {"qk_layernorm": True}, "config": {}})
        'tpcheck verify phi --tp 2 --set qk_layernorm=true'
    """
    words = ["tpcheck", "verify", str(subject["family"])]
    for option, default in _DEFAULTS.items():
        if subject.get(option, default) != default:
            words += [f"--{option}", str(subject[option])]
    if subject.get("batch"):
        words += ["--batch", str(subject["batch"])]
    try:
        for key, value in subject.get("settings", {}).items():
            words += ["--set", f"{key}={json.dumps(_as_json(value))}"]
        if subject.get("config"):
            words += ["--config", json.dumps(_as_json(subject["config"]))]
    except (TypeError, RecursionError):
        return None
    words += [word for check in subject.get("checks", ()) for word in ("--checks", check)]
    if subject.get("ignore_plan"):
        words.append("--ignore-plan")
    return shlex.join(words)


def _as_json(value: Any) -> Any:
    """Return a value as it comes back from JSON, but for tuples, which become lists.

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


def checkpoint_command(
    paths: Sequence[str] | None, dtype: str | None, earlier: Sequence[str] | None, allow_pickle: bool
) -> str | None:
    """Return `tpcheck checkpoint ACTUAL REFERENCE ...`, or None where something compared was no file or folder.

    Example:
        >>> checkpoint_command(["saved", "reference"], "bfloat16", [], False)
        'tpcheck checkpoint saved reference --dtype bfloat16'
    """
    if paths is None or earlier is None:
        return None
    words = ["tpcheck", "checkpoint", *paths, *(["--dtype", dtype] if dtype else [])]
    words += [word for path in earlier for word in ("--earlier", path)]
    return shlex.join([*words, *(["--allow-pickle"] if allow_pickle else [])])


def compare_command(candidate: str, reference: str) -> str:
    """Return the command that compares two traces."""
    return shlex.join(["tpcheck", "compare", candidate, reference])
