"""JSON files of a checkpoint, which may be damaged or hostile, and the index of a checkpoint of several files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tpcheck.checkpoints.formats.files import Files, inside, is_present, shortened
from tpcheck.core.errors import CheckpointError

MAX_NBYTES = 32 << 20
"""The table of 250,000 tensors; the objects that Python makes of it stay below 1 GB whatever it holds."""


def read_json(path: Path, files: Files, *, strict: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file; see `parse_json`.

    Raises:
        CheckpointError: The file holds anything else.
    """
    file = files.open(path)
    if file.size > MAX_NBYTES:
        raise CheckpointError(f"{path} has {file.size} bytes, which is more than a JSON file of a checkpoint needs.")
    return parse_json(file.read(0, file.size), str(path), strict=strict)


def read_config(folder: Path, files: Files, name: str = "config.json") -> dict[str, Any]:
    """Return the model's configuration, which may hold infinities as Mamba's does; empty where there is none."""
    return read_json(folder / name, files, strict=False) if is_present(folder / name) else {}


def parse_json(data: bytes | bytearray, where: str, *, strict: bool) -> dict[str, Any]:
    """Return the JSON object; if strict, refuse repeated keys, infinities and NaN.

    Args:
        where: What holds the data, for error messages.
    """
    try:
        hooks: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _refuse} if strict else {}
        value = json.loads(data.decode("utf-8"), **hooks)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be JSON of a checkpoint.") from None
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {shortened(str(error))}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} does not hold a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {shortened(key)} is duplicated")
        for text in (key, value):
            if isinstance(text, str) and not text.isascii():
                text.encode()  # raises a ValueError for a lone surrogate, which is not text
        entries[key] = value
    return entries


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


T = TypeVar("T")


def read_index(path: Path, files: Files) -> dict[str, Path]:
    """Return the file of each tensor.

    Raises:
        CheckpointError: The index is damaged, or names what is not a file in its folder.
    """
    weight_map = read_json(path, files).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} names no tensors: it has no weight_map.")
    paths: dict[str, Path] = {}
    for name in weight_map.values():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} names a file {shortened(name)}, which is not a file name.")
        if name not in paths:
            paths[name] = inside(path.parent, name)
            if not is_present(paths[name]):
                raise CheckpointError(f"{path} names {shortened(name)}, which is missing.")
    return {tensor: paths[name] for tensor, name in weight_map.items()}


def merge_files(index: Path, files_of: Mapping[str, Path], read: Callable[[Path], Mapping[str, T]]) -> dict[str, T]:
    """Return the contents of all files by tensor, including tensors that the index does not list.

    Args:
        index: The index, for error messages.
        files_of: The file of each tensor, by the index.
        read: Returns the tensors of one file.

    Raises:
        CheckpointError: A file does not hold what the index says, or two files hold the same tensor.
    """
    tensors: dict[str, T] = {}
    path_of: dict[str, Path] = {}
    for path in dict.fromkeys(files_of.values()):
        for name, tensor in read(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"Tensor {shortened(name)} is both in {path_of[name].name} and in {path.name}: "
                    "the files hold shards of one model, or two versions of it."
                )
            tensors[name], path_of[name] = tensor, path
    for name, path in files_of.items():
        if path_of.get(name) != path:
            raise CheckpointError(f"{index} says that tensor {shortened(name)} is in {path.name}, which lacks it.")
    return tensors


def not_in_index(index: Path) -> str:
    """Return why a tensor that a file holds and the index does not list is not read."""
    return f"{index.name} does not list it, though one of its files holds it"
