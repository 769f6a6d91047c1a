"""The index of a checkpoint that is cut into several files: which tensor lies in which of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from tpcheck.checkpoints.files import Files, inside, shortened
from tpcheck.checkpoints.folders import is_present
from tpcheck.checkpoints.strict_json import read_json
from tpcheck.errors import CheckpointError

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
