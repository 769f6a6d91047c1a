"""Reads the JSON files of a checkpoint, which may be damaged or hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpcheck.checkpoints.files import Files, shortened
from tpcheck.checkpoints.folders import is_present
from tpcheck.errors import CheckpointError

LARGEST_JSON = 32 << 20
"""Bytes: the table of 250,000 tensors; what Python makes of it stays below 1 GB whatever it says."""


def read_json(path: Path, files: Files) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: It holds anything else.
    """
    file = files.open(path)
    if file.size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {file.size} bytes, which is more than a table of tensors needs.")
    return parsed(file.read(0, file.size), str(path), strict=True)


def read_config(folder: Path, files: Files, name: str = "config.json") -> dict[str, Any]:
    """Return the model's configuration, which may hold infinities as Mamba's do, or nothing where there is none."""
    path = folder / name
    if not is_present(path):
        return {}
    file = files.open(path)
    if file.size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {file.size} bytes, which is more than a configuration needs.")
    return parsed(file.read(0, file.size), str(path), strict=False)


def parsed(data: bytes | bytearray, where: str, *, strict: bool) -> dict[str, Any]:
    """Return the JSON object; strictly, without keys that are given twice, infinities or NaN."""
    try:
        rules: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _refused} if strict else {}
        value = json.loads(data.decode("utf-8"), **rules)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be JSON of a checkpoint.") from None
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {shortened(str(error))}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} does not hold a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shortened(twice)} is there twice")
    for part in (*found, *found.values()):
        if isinstance(part, str) and not part.isascii():
            part.encode()  # a lone surrogate is no text, and raises a ValueError
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
