"""Option values that typer cannot parse: `--set KEY=VALUE`, `--config JSON|FILE`, lists, and files to write."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpcheck.cli.terminal import is_special
from tpcheck.core.errors import UsageError

_WORDS = {"true": True, "false": False, "none": None}


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the settings of `--set KEY=VALUE`; a value is JSON, true, false or none, or else text.

    Example:
        >>> settings(["qk_layernorm=True", "head_dim=8", "hidden_act=gelu"])
        {'qk_layernorm': True, 'head_dim': 8, 'hidden_act': 'gelu'}
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError("set", pair, "KEY=VALUE")
        parsed[key.strip()] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return _WORDS.get(text.lower(), text)


def json_object(name: str, source: str) -> dict[str, Any]:
    """Return the JSON object in `source`, which is JSON or the path of a file.

    Raises:
        UsageError: The file does not exist, the text is not valid JSON, or no object.
    """
    text = source if source.lstrip().startswith(("{", "[")) else _read(name, source)
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(name, source, f"valid JSON; {error.msg} at {place}") from error
    if not isinstance(parsed, dict):
        raise UsageError(name, source, "a JSON object")
    return parsed


def name_or_object(name: str, source: str, marks: str = "") -> str | dict[str, Any]:
    """Return a name as it is, and the JSON object that `source` is, or that stands in the file of this name.

    Args:
        marks: What names hold beside letters, digits and `_`.

    Example:
        >>> name_or_object("optimizer", "adamw"), name_or_object("optimizer", '{"type": "AdamW"}')
        ('adamw', {'type': 'AdamW'})
    """
    is_name = (
        bool(source)
        and all(letter.isalnum() or letter in f"_{marks}" for letter in source)
        and not source.endswith(".json")
    )
    return source if is_name else json_object(name, source)


def _read(name: str, source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(name, source, f"a JSON object or a file that holds one ({reason})") from error


_HEAD = 64  # bytes
_MARKS = {"json": b'"schema"', "junit": b"<testsuites", "html": b"<!doctype html"}
"""What the first bytes of each kind of file hold that tpcheck writes."""


def _holds_something_else(path: Path, mark: bytes) -> bool:
    """Return whether a file holds other than results, such as a configuration or a script given to the wrong option."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False  # opening it to write says why
    return head.strip() != b"" and mark not in head.lower()


def writable(name: str, path: Path | None) -> Path | None:
    """Return the path after a check, before a long run, that a file can be written there."""
    if path is None:
        return None
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(name, str(path), "a file in a folder that exists")
    if name in _MARKS and path.is_file() and _holds_something_else(path, _MARKS[name]):
        raise UsageError(name, str(path), "a new file, or one of results: this one holds something else")
    try:
        if is_special(path):
            path.open("w").close()
        else:  # by trial: permissions mean little on network folders, and nothing to root
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise UsageError(name, str(path), f"a file that can be written ({error.strerror or error})") from error
    return path


def names(name: str, text: str) -> list[str]:
    """Return the distinct names of a comma-separated list.

    Raises:
        UsageError: The list is empty.
    """
    listed = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not listed:
        raise UsageError(name, text, "a name, or several with commas between them")
    return listed


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def dtypes(text: str) -> list[str]:
    """Return the dtypes of a comma-separated list by torch's names.

    Example:
        >>> dtypes("bf16,float64")
        ['bfloat16', 'float64']
    """
    return list(dict.fromkeys(full_dtype(name) for name in names("dtype", text)))


def full_dtype(name: str) -> str:
    """Return torch's name of a dtype, which may be given by a short one."""
    return _DTYPES.get(name, name)


def integers(name: str, text: str) -> list[int]:
    """Return the integers of a comma-separated list.

    Example:
        >>> integers("tp", "2,4")
        [2, 4]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(name, text, "an integer, or several with commas between them") from error
