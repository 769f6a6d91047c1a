"""The `.metadata` of torch.distributed.checkpoint: a pickle, of which nothing is made; its fields are looked at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcheck.adapters import ReadOptions
from tpcheck.checkpoints.dcp_pickle import metadata_record
from tpcheck.checkpoints.files import Files, inside, shortened
from tpcheck.checkpoints.inert import Inert
from tpcheck.errors import CheckpointError

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a tensor and where it was saved.

    Attributes:
        offsets: Indices at which it starts in the whole tensor.
        path: The file.
        start: Position of its first byte, which is that of a whole file of `torch.save`.
        nbytes: Length of that file.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SavedTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a DCP folder holds.

    Attributes:
        tensors: By flat name.
        others: Names of what is no tensor, with the reason; tensors that cannot be read among them.
        keys: For each flat name the keys that led to it in the nested state dict, where the planner kept them.
    """

    tensors: Mapping[str, SavedTensor]
    others: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]]


def read_metadata(folder: Path, files: Files, options: ReadOptions) -> Saved:
    """Return what the folder's metadata says.

    Raises:
        CheckpointError: It is damaged, names files outside of the folder, or says what cannot be.
    """
    path = folder / METADATA
    metadata = metadata_record(path, files, options)
    entries = _mapping(path, _field(path, metadata, "state_dict_metadata"))
    places = _places(folder, path, _field(path, metadata, "storage_data"))
    tensors: dict[str, SavedTensor] = {}
    others: dict[str, str] = {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not name.isprintable():
            raise CheckpointError(f"{path} has an entry with a name that is no text: {shortened(name)}.")
        compressed = any(place.transformed for place in places.get(name, {}).values())
        if _kind(entry) == "BytesStorageMetadata":
            others[name] = "is a pickled object, not a tensor"
        elif _kind(entry) != "TensorStorageMetadata":
            raise CheckpointError(f"{path} has an entry {shortened(name)} of an unknown kind.")
        elif compressed:
            others[name] = "is compressed by an extension of torch.distributed.checkpoint"
        else:
            tensors[name] = _tensor(path, name, entry, places.get(name, {}))
    return Saved(tensors, others, dict(_keys(_optional(metadata, "planner_data"))))


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    start: int
    nbytes: int
    transformed: bool


_Places = dict[str, dict[tuple[int, ...] | None, _Place]]


def _tensor(path: Path, name: str, entry: Any, places: Mapping[tuple[int, ...] | None, _Place]) -> SavedTensor:
    shape = _sizes(path, name, _field(path, entry, "size"))
    properties = _field(path, entry, "properties")
    state = properties.state if isinstance(properties, Inert) else None
    dtype = state[0] if isinstance(state, tuple) and state else _optional(properties, "dtype")
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{path} does not say of which dtype {shortened(name)} is.")
    listed = _field(path, entry, "chunks")
    chunks = []
    for chunk in listed if isinstance(listed, list) else ():
        offsets = _sizes(path, name, _first_field(path, chunk, "offsets", "shard_offsets"))
        sizes = _sizes(path, name, _first_field(path, chunk, "sizes", "shard_sizes"))
        if not len(offsets) == len(sizes) == len(shape):
            raise CheckpointError(f"{path} has a chunk of {shortened(name)} with another number of dims.")
        if any(at + size > whole for at, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(f"{path} has a chunk of {shortened(name)} that reaches out of the tensor.")
        place = places.get(offsets, places.get(None))
        if place is None:
            raise CheckpointError(f"{path} does not say in which file the chunk of {shortened(name)} at {offsets} is.")
        chunks.append(Chunk(offsets, sizes, place.path, place.start, place.nbytes))
    return SavedTensor(shape, dtype, tuple(chunks))


def _places(folder: Path, path: Path, storage: Any) -> _Places:
    found: _Places = defaultdict(dict)
    paths: dict[str, Path] = {}
    for index, info in _mapping(path, storage).items():
        name, offsets = _field(path, index, "fqn"), _optional(index, "offset")
        file, start = _field(path, info, "relative_path"), _field(path, info, "offset")
        nbytes = _field(path, info, "length")
        if not isinstance(name, str) or not (offsets is None or isinstance(offsets, tuple)):
            raise CheckpointError(f"{path} has a place of no tensor.")
        if not all(type(one) is int and 0 <= one < 1 << 62 for one in (start, nbytes)):
            raise CheckpointError(f"{path} has a place of {shortened(name)} that is no part of a file.")
        if not isinstance(file, str) or file not in paths:
            paths[file] = inside(folder, file)
        if offsets in found[name]:
            raise CheckpointError(f"{path} has two places for the same chunk of {shortened(name)}.")
        found[name][offsets] = _Place(paths[file], start, nbytes, bool(_optional(info, "transform_descriptors")))
    return found


def _keys(planner_data: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, keys in planner_data.items() if isinstance(planner_data, Mapping) else ():
        if isinstance(name, str) and isinstance(keys, tuple) and keys:
            yield name, tuple(map(str, keys))


def _kind(entry: Any) -> str:
    return entry.name.rpartition(".")[2] if isinstance(entry, Inert) else ""


def _fields(value: Any) -> Mapping[Any, Any]:
    return value.state if isinstance(value, Inert) and isinstance(value.state, Mapping) else {}


def _optional(value: Any, name: str) -> Any:
    return _fields(value).get(name)


def _field(path: Path, value: Any, name: str) -> Any:
    if name not in _fields(value):
        raise CheckpointError(f"{path} is no metadata of torch.distributed.checkpoint: a field {name} is missing.")
    return _fields(value)[name]


def _first_field(path: Path, value: Any, *names: str) -> Any:
    return next((_fields(value)[name] for name in names if name in _fields(value)), None) or _field(
        path, value, names[0]
    )


def _mapping(path: Path, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} is no metadata of torch.distributed.checkpoint: a table is missing.")
    return value


def _sizes(path: Path, name: str, value: Any) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (-1,)
    if len(sizes) > 64 or not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes):
        raise CheckpointError(f"{path} has a shape of {shortened(name)} that is none.")
    return sizes
