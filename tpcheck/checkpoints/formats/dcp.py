"""Checkpoints of torch.distributed.checkpoint (DCP): a `.metadata` file beside `*.distcp` files that hold chunks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Extent, ReadOptions, TrainingStates
from tpcheck.checkpoints.formats.file_checkpoint import Chunk, ChunkedTensor, FileCheckpoint, tensor_from_chunks
from tpcheck.checkpoints.formats.files import Files, OpenFile, inside, is_folder, is_present, read_config, shortened
from tpcheck.checkpoints.formats.storage_view import StorageView
from tpcheck.checkpoints.formats.torch_files import KEYS, RefusedError, read_structure
from tpcheck.checkpoints.formats.training_states import CLASSES as CLASSES_OF_STATES
from tpcheck.checkpoints.formats.training_states import StateTable, nested
from tpcheck.checkpoints.formats.unpickler import PickledObject, SafeUnpickler, Stream
from tpcheck.core.errors import CheckpointError

METADATA = ".metadata"

MAX_METADATA_NBYTES = 256 << 20
"""About 300 for each chunk."""

MAX_METADATA_STEPS = 28_000_000
"""Steps of its pickle: 250,000 chunks, which take half a gigabyte while they are read."""

CLASSES = (
    "torch.distributed.checkpoint.*",
    "torch.distributed._shard.*",  # where torch 1.13 and 2.0 had them
    "megatron.core.dist_checkpointing.*",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
)
"""Classes that torch and Megatron write into the metadata."""


def _read_pickle(path: Path, files: Files, options: ReadOptions) -> PickledObject:
    """Return the metadata, with a `PickledObject` for each object."""
    file = files.open(path)
    if file.size > MAX_METADATA_NBYTES:
        raise CheckpointError(f"{path} has {file.size} bytes, which is more than the metadata of a model needs.")
    classes = ("*",) if options.allow_pickle else CLASSES  # none of them is created either way
    stream = Stream(file, 0, file.size, max_steps=MAX_METADATA_STEPS)
    unpickler = _MetadataUnpickler(stream, keep=classes, persistent_load=_refuse_storage)
    try:
        metadata = unpickler.load()
    except Exception as error:  # a damaged pickle raises any type
        _require_none_refused(path, unpickler)
        reason = str(error).removesuffix(".") if isinstance(error, CheckpointError) else type(error).__name__
        raise CheckpointError(f"{path} is not the metadata of torch.distributed.checkpoint: {reason}.") from error
    _require_none_refused(path, unpickler)
    if not isinstance(metadata, PickledObject):
        raise CheckpointError(f"{path} is not the metadata of torch.distributed.checkpoint: it holds another object.")
    return metadata


class _MetadataUnpickler(SafeUnpickler):
    """Also reads mappings whose keys are objects, such as `storage_data`."""

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, PickledObject) and isinstance(target, dict):
                target[key] = value
            else:
                super()._set([key, value])


def _require_none_refused(path: Path, unpickler: SafeUnpickler) -> None:
    if unpickler.refused:
        names = ", ".join(name if name.isprintable() else repr(name) for name in list(unpickler.refused)[:8])
        raise CheckpointError(
            f"{path} is refused, because it names {names[:400]}, which the metadata of torch.distributed.checkpoint "
            "never does; --allow-pickle reads the rest of it."
        )


def _refuse_storage(_: Any) -> Any:
    raise CheckpointError("it refers to external storages, which the metadata must not")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk of a tensor was saved: as a whole file of `torch.save` within another file.

    Attributes:
        path: The file.
        start: Position of its first byte there.
        nbytes: Length of the file of `torch.save`.
        is_compressed: Whether an extension of torch.distributed.checkpoint compressed it.
    """

    path: Path
    start: int
    nbytes: int
    is_compressed: bool


@dataclass(frozen=True, slots=True)
class LazyChunk:
    """A chunk whose table of contents is read when its elements are: a model may have 100,000 of them."""

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place

    def extent(self) -> Extent | None:
        return None

    def read(self, files: Files, rows: range) -> torch.Tensor:
        return self.open(files).read(files, rows)

    def open(self, files: Files) -> StorageView:
        """Return the chunk as a view of the file.

        Raises:
            CheckpointError: The file does not hold the tensor that the metadata describes.
        """
        file = files.open(self.place.path)
        where = f"The chunk of {shortened(self.name)} at byte {self.place.start} of {self.place.path}"
        try:
            tensor = read_structure(_FilePart(file, self.place.start, self.place.nbytes))
        except (CheckpointError, RefusedError) as error:
            raise CheckpointError(f"{where} is not a tensor that torch saved, or it is damaged.") from error
        if not isinstance(tensor, StorageView) or (tensor.shape, tensor.dtype) != (self.shape, self.dtype):
            kind = f"{list(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, StorageView) else "not a tensor"
            raise CheckpointError(f"{where} is {kind}, but the metadata states {list(self.shape)} of {self.dtype}.")
        if tensor.storage.offset is None:
            raise CheckpointError(f"{where} has no elements.")
        return replace(tensor, storage=replace(tensor.storage, offset=tensor.storage.offset + self.place.start))


class _FilePart(OpenFile):
    """A part of an open file, which reads as a file."""

    __slots__ = ("_file", "_start")

    def __init__(self, file: OpenFile, start: int, nbytes: int) -> None:
        self.path, self.size = file.path, nbytes
        self._file, self._start = file, start
        self._descriptor = None

    def read(self, offset: int, nbytes: int) -> bytearray:
        self._require_range(offset, nbytes)
        return self._file.read(self._start + offset, nbytes)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor by the metadata, whose chunks may overlap or leave a gap."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[LazyChunk, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """The contents of a DCP folder.

    Attributes:
        tensors: Tensors by their flat name.
        others: The reason for each entry that is not a tensor or cannot be read.
        objects: Where the pickled objects among them lie.
        keys: For each flat name the keys that lead to it in the nested state dict, where the planner saved them.
    """

    tensors: Mapping[str, SavedTensor]
    others: Mapping[str, str]
    objects: Mapping[str, Place]
    keys: Mapping[str, tuple[str, ...]]


def read_metadata(folder: Path, files: Files, options: ReadOptions) -> Metadata:
    """Read the metadata of a folder.

    Raises:
        CheckpointError: The metadata is damaged, contradicts itself, or names classes or files that it should not.
    """
    path = folder / METADATA
    metadata = _read_pickle(path, files, options)
    entries = _mapping(path, _field(path, metadata, "state_dict_metadata"))
    places = _places(folder, path, _field(path, metadata, "storage_data"))
    tensors: dict[str, SavedTensor] = {}
    others: dict[str, str] = {}
    objects: dict[str, Place] = {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not name.isprintable():
            raise CheckpointError(f"{path} has an entry with a name that is not text: {shortened(name)}.")
        compressed = any(place.is_compressed for place in places.get(name, {}).values())
        if _kind(entry) == "BytesStorageMetadata":
            others[name] = "is a pickled object, not a tensor"
            place = next(iter(places.get(name, {}).values()), None)
            objects |= {name: place} if place is not None and not place.is_compressed else {}
        elif _kind(entry) != "TensorStorageMetadata":
            raise CheckpointError(f"{path} has an entry {shortened(name)} of an unknown kind.")
        elif compressed:
            others[name] = "is compressed by an extension of torch.distributed.checkpoint"
        else:
            tensors[name] = _tensor(path, name, entry, places.get(name, {}))
    return Metadata(tensors, others, objects, dict(_keys(_optional(metadata, "planner_data"))))


_Places = dict[str, dict[tuple[int, ...] | None, Place]]


def _tensor(path: Path, name: str, entry: Any, places: Mapping[tuple[int, ...] | None, Place]) -> SavedTensor:
    shape = _sizes(path, name, _field(path, entry, "size"))
    properties = _field(path, entry, "properties")
    state = properties.state if isinstance(properties, PickledObject) else None
    dtype = state[0] if isinstance(state, tuple) and state else _optional(properties, "dtype")
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{path} does not state the dtype of {shortened(name)}.")
    listed = _field(path, entry, "chunks")
    chunks = []
    for chunk in listed if isinstance(listed, list) else ():
        offsets = _sizes(path, name, _first_field(path, chunk, "offsets", "shard_offsets"))
        sizes = _sizes(path, name, _first_field(path, chunk, "sizes", "shard_sizes"))
        if not len(offsets) == len(sizes) == len(shape):
            raise CheckpointError(f"{path} has a chunk of {shortened(name)} with another number of dims.")
        if any(start + size > limit for start, size, limit in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(f"{path} has a chunk of {shortened(name)} that reaches beyond the tensor.")
        place = places.get(offsets, places.get(None))
        if place is None:
            raise CheckpointError(f"{path} does not state the file of the chunk of {shortened(name)} at {offsets}.")
        chunks.append(LazyChunk(name, dtype, offsets, sizes, place))
    return SavedTensor(shape, dtype, tuple(chunks))


def _places(folder: Path, path: Path, storage: Any) -> _Places:
    places: _Places = defaultdict(dict)
    paths: dict[str, Path] = {}
    for index, info in _mapping(path, storage).items():
        name, offsets = _field(path, index, "fqn"), _optional(index, "offset")
        file, start = _field(path, info, "relative_path"), _field(path, info, "offset")
        nbytes = _field(path, info, "length")
        if not isinstance(name, str) or not (offsets is None or isinstance(offsets, tuple)):
            raise CheckpointError(f"{path} has an invalid tensor index.")
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in (start, nbytes)):
            raise CheckpointError(f"{path} has an invalid byte range for {shortened(name)}.")
        if not isinstance(file, str) or file not in paths:
            paths[file] = inside(folder, file)
        if offsets in places[name]:
            raise CheckpointError(f"{path} has two places for the same chunk of {shortened(name)}.")
        places[name][offsets] = Place(paths[file], start, nbytes, bool(_optional(info, "transform_descriptors")))
    return places


def _keys(planner_data: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, keys in planner_data.items() if isinstance(planner_data, Mapping) else ():
        if isinstance(name, str) and isinstance(keys, tuple) and keys:
            yield name, tuple(map(str, keys))


def _kind(entry: Any) -> str:
    return entry.name.rpartition(".")[2] if isinstance(entry, PickledObject) else ""


def _fields(value: Any) -> Mapping[Any, Any]:
    return value.state if isinstance(value, PickledObject) and isinstance(value.state, Mapping) else {}


def _optional(value: Any, name: str) -> Any:
    return _fields(value).get(name)


def _field(path: Path, value: Any, name: str) -> Any:
    if name not in _fields(value):
        raise CheckpointError(
            f"{path} is not the metadata of torch.distributed.checkpoint: the field {name} is missing."
        )
    return _fields(value)[name]


def _first_field(path: Path, value: Any, *names: str) -> Any:
    return next((_fields(value)[name] for name in names if name in _fields(value)), None) or _field(
        path, value, names[0]
    )


def _mapping(path: Path, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} is not the metadata of torch.distributed.checkpoint: a mapping is missing.")
    return value


def _sizes(path: Path, name: str, value: Any) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (-1,)
    if len(sizes) > 64 or not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes):
        raise CheckpointError(f"{path} has a shape of {shortened(name)} that is not made of sizes.")
    return sizes


def read_chunks(folder: Path, name: str, saved: SavedTensor, files: Files) -> ChunkedTensor:
    """Return the tensor that its chunks make up.

    Raises:
        CheckpointError: They overlap, leave a gap, or reach beyond their file.
    """
    for place in (chunk.place for chunk in saved.chunks):
        size, end = files.open(place.path).size, place.start + place.nbytes
        if end > size:
            raise CheckpointError(
                f"{place.path} has {size} bytes, but its chunk of {shortened(name)} ends at byte {end}."
            )
    if not saved.chunks:
        raise CheckpointError(f"{folder} holds no chunk of {shortened(name)}.")
    tensor = tensor_from_chunks(name, folder, [Chunk(chunk.offsets, chunk) for chunk in saved.chunks])
    if tensor.shape != saved.shape:
        raise CheckpointError(
            f"{folder} holds chunks of {shortened(name)} that make up the shape {list(tensor.shape)} in place of "
            f"{list(saved.shape)}."
        )
    if len(saved.chunks) > 1:
        return tensor
    only = saved.chunks[0].open(files)  # so that it has an extent
    return replace(tensor, chunks=(Chunk(saved.chunks[0].offsets, only),))


NOT_THE_MODEL = ("optim", "lr_scheduler", "scheduler", "dataloader", "train_state", "rng", "ema")
"""First words of the keys under which trainers save other states than the model's."""

Keys = tuple[str, ...]


class DcpFormat:
    """Opens a folder of `dcp.save`; of a nested state dict, the model."""

    name = "dcp"
    precedence = 35  # above pytorch, which recognises any single file of torch.save in a folder

    def recognises(self, source: Any) -> bool:
        return is_folder(source) and is_present(source / METADATA)

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            return _open(source, files, options)


def _open(folder: Path, files: Files, options: ReadOptions) -> FileCheckpoint:
    saved = read_metadata(folder, files, options)
    new_names, part = _model_names(folder, saved)
    tensors: dict[str, ChunkedTensor] = {
        new: read_chunks(folder, old, saved.tensors[old], files)
        for old, new in new_names.items()
        if old in saved.tensors
    }
    unread = {new: saved.others[old] for old, new in new_names.items() if old in saved.others}
    model = [saved.tensors[old] for old in new_names if old in saved.tensors]
    num_files = len({chunk.place.path for tensor in model for chunk in tensor.chunks})
    description = f"torch.distributed.checkpoint, {num_files} files{part}"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    others = {name: _state_keys(name, saved.keys) for name in (*saved.tensors, *saved.objects) if name not in new_names}
    return FileCheckpoint(
        files,
        description,
        tensors,
        read_config(folder, files),
        unread=unread,
        read_states=lambda: read_other_entries(folder, saved, others, files, shapes),
    )


def read_other_entries(
    folder: Path,
    saved: Metadata,
    keys: Mapping[str, Keys],
    files: Files,
    model: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, Any] | None = None,
) -> TrainingStates | None:
    """Return the entries beside the model.

    Args:
        keys: For each saved name the keys that lead to it, those of an optimizer as torch has them.
        model: Shapes of the model's tensors.
        entries: Entries from elsewhere, to which these are added.
    """
    found = {path: saved.tensors.get(name) or _object(saved.objects[name], files) for name, path in keys.items()}
    whole = {
        path: read_chunks(folder, path[-1], tensor, files)
        for path, tensor in found.items()
        if isinstance(tensor, SavedTensor)
    }
    table = StateTable()
    table.add_entries({**(entries or {}), **nested({**found, **whole})}, files, model)
    return table.states(files)


_FLAT_STATE = re.compile(r"(?P<optimizer>.*optim\w*)\.state\.(?P<parameter>.+)\.(?P<kind>\w+)")
_FLAT_GROUP = re.compile(r"(?P<optimizer>.*optim\w*)\.param_groups\.(?P<group>.+)\.(?P<option>\w+)")


def _state_keys(name: str, keys: Mapping[str, Keys]) -> Keys:
    """Return the keys that lead to an entry; a flat name of an optimizer's is taken apart."""
    if len(keys.get(name, ())) > 1:
        return keys[name]
    state, group = _FLAT_STATE.fullmatch(name), _FLAT_GROUP.fullmatch(name)
    if state is not None:
        return state["optimizer"], "state", state["parameter"], state["kind"]
    return (group["optimizer"], "param_groups", group["group"], group["option"]) if group is not None else (name,)


def _object(place: Place, files: Files) -> Any:
    """Return a pickled object, or what refuses it."""
    try:
        return read_structure(_FilePart(files.open(place.path), place.start, place.nbytes), CLASSES_OF_STATES)
    except RefusedError as refusal:
        raise CheckpointError(
            f"The object at byte {place.start} of {place.path} is refused, because reading it would run {refusal}; "
            "--weights-only leaves it out."
        ) from None


def _model_names(folder: Path, saved: Metadata) -> tuple[Mapping[str, str], str]:
    """Return the name in the model for each saved name of it, and which part of the state dict it is, if not all.

    Raises:
        CheckpointError: Several entries could be the model.
    """
    keys = {name: saved.keys.get(name, (name,)) for name in (*saved.tensors, *saved.others)}
    prefix = _prefix(folder, {keys[name] for name in saved.tensors})
    if prefix is None:  # the names of the model, perhaps with an optimizer beside them
        names = {name: name for name, path in keys.items() if len(path) == 1 and not _is_not_model(path[0])}
        left_out = sorted({path[0] for name, path in keys.items() if name not in names})
        without = f", without {', '.join(map(repr, left_out[:5]))}" if left_out else ""
        return names, without if any(name in saved.tensors for name in names) else ""
    names = {
        name: ".".join(path[len(prefix) :])
        for name, path in keys.items()
        if path[: len(prefix)] == prefix and len(path) > len(prefix)
    }
    return names, f", under {'.'.join(prefix)!r}" if prefix else ""


def _prefix(folder: Path, paths: set[Keys]) -> Keys | None:
    """Return the keys that lead to the model, or None where its names are at the top level."""
    by_name = {path[: i + 1] for path in paths for i, key in enumerate(path[:-1]) if key in KEYS}
    depth = min(map(len, by_name), default=0)
    nearest = sorted(prefix for prefix in by_name if len(prefix) == depth and not any(map(_is_not_model, prefix)))
    if not nearest and not any(len(path) == 1 for path in paths):
        nearest = sorted({path[:1] for path in paths if not _is_not_model(path[0])})
    if len(nearest) > 1:
        keys = ", ".join(repr(".".join(prefix)) for prefix in nearest[:5])
        raise CheckpointError(
            f"{folder} holds several state dicts, under {keys}; save one of them to its own folder and pass that."
        )
    return nearest[0] if nearest else None


def _is_not_model(key: str) -> bool:
    return key.startswith(NOT_THE_MODEL)
