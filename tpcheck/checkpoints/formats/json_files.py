"""JSON files of a checkpoint, which may be damaged or hostile, and the index of one that is cut into several files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tpcheck.checkpoints.formats.files import Files, inside, is_present, shortened
from tpcheck.core.errors import CheckpointError

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


T = TypeVar("T")


def read_index(path: Path, files: Files) -> dict[str, Path]:
    """Return the file of each tensor.

    Raises:
        CheckpointError: The index is damaged, or names what is not a file in its own folder.
    """
    weight_map = read_json(path, files).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} names no tensors: it has no weight_map.")
    paths = {name: _shard(path, name) for name in _distinct(path, weight_map.values())}
    return {tensor: paths[name] for tensor, name in weight_map.items()}


def gathered(index: Path, files_of: Mapping[str, Path], held: Callable[[Path], Mapping[str, T]]) -> dict[str, T]:
    """Return what the files hold, by tensor, those that the index does not list included.

    Raises:
        CheckpointError: A file does not hold what the index says, or two files hold the same tensor.
    """
    found: dict[str, T] = {}
    place: dict[str, Path] = {}
    for path in dict.fromkeys(files_of.values()):
        for name, tensor in held(path).items():
            if name in found:
                raise CheckpointError(
                    f"Tensor {shortened(name)} is both in {place[name].name} and in {path.name}: "
                    "shards of it, or two versions, are not one model."
                )
            found[name], place[name] = tensor, path
    for name, path in files_of.items():
        if place.get(name) != path:
            raise CheckpointError(f"{index} says that tensor {shortened(name)} is in {path.name}, which lacks it.")
    return found


def _distinct(index: Path, names: Iterable[object]) -> dict[str, None]:
    distinct: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str):
            raise CheckpointError(f"{index} names a file {shortened(name)}, which is no file's name.")
        distinct[name] = None
    return distinct


def _shard(index: Path, name: str) -> Path:
    path = inside(index.parent, name)
    if not is_present(path):
        raise CheckpointError(f"{index} names {shortened(name)}, which is missing.")
    return path
