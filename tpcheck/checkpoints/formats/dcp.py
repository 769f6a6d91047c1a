"""Checkpoints of torch.distributed.checkpoint: a `.metadata` file beside `*.distcp` files that hold chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Extent, ReadOptions
from tpcheck.checkpoints.formats.files import Files, OpenFile, as_path, inside, is_folder, is_present, shortened
from tpcheck.checkpoints.formats.json_files import read_config
from tpcheck.checkpoints.formats.stored import StoredTensor
from tpcheck.checkpoints.formats.table import Box, BoxedTensor, TableCheckpoint, put_together
from tpcheck.checkpoints.formats.torch_files import KEYS, load
from tpcheck.checkpoints.formats.unpickler import Inert, InertUnpickler, Stream
from tpcheck.core.errors import CheckpointError

LARGEST_METADATA = 256 << 20
"""Bytes, some 300 for each chunk."""

MORE_STEPS = 24
"""Millions of steps beyond those of a torch file: 250,000 chunks, or half a gigabyte while they are looked at."""

CLASSES = (
    "torch.distributed.checkpoint.*",
    "torch.distributed._shard.*",  # where torch 1.13 and 2.0 had them
    "megatron.core.dist_checkpointing.*",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
)
"""What torch and Megatron write."""


def metadata_record(path: Path, files: Files, options: ReadOptions) -> Inert:
    """Return what the file holds, with `Inert` for each object.

    Raises:
        CheckpointError: It is damaged, or names classes that no metadata has.
    """
    file = files.open(path)
    if file.size > LARGEST_METADATA:
        raise CheckpointError(f"{path} has {file.size} bytes, which is more than a table of tensors needs.")
    classes = ("*",) if options.allow_pickle else CLASSES  # nothing is made of them either way
    unpickler = _MetadataUnpickler(_LongStream(file), inert=classes, persistent_load=_no_persistent)
    try:
        metadata = unpickler.load()
    except Exception as error:  # a damaged pickle raises anything
        _require_none_refused(path, unpickler)
        reason = str(error).removesuffix(".") if isinstance(error, CheckpointError) else type(error).__name__
        raise CheckpointError(f"{path} is no metadata of torch.distributed.checkpoint: {reason}.") from error
    _require_none_refused(path, unpickler)
    if not isinstance(metadata, Inert):
        raise CheckpointError(f"{path} is no metadata of torch.distributed.checkpoint: it holds other data.")
    return metadata


class _MetadataUnpickler(InertUnpickler):
    """Also keeps mappings whose keys are objects: `storage_data` is one."""

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, Inert) and isinstance(target, dict):
                target[key] = value
            else:
                super()._set([key, value])


class _LongStream(Stream):
    """Reads on for more steps."""

    def __init__(self, file: OpenFile) -> None:
        super().__init__(file, 0, file.size)
        self._left = MORE_STEPS

    def read(self, nbytes: int) -> bytes:
        if self._reads >= 1_000_000 and self._left:
            self._reads, self._left = 0, self._left - 1
        return super().read(nbytes)


def _require_none_refused(path: Path, unpickler: InertUnpickler) -> None:
    if unpickler.refused:
        names = ", ".join(name if name.isprintable() else repr(name) for name in list(unpickler.refused)[:8])
        raise CheckpointError(
            f"{path} is refused, because it names {names[:400]}, which no metadata of torch.distributed.checkpoint "
            "does: --allow-pickle reads past them."
        )


def _no_persistent(_: Any) -> Any:
    raise CheckpointError("it refers to storages")


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


def put_chunks_together(folder: Path, name: str, saved: SavedTensor, files: Files) -> BoxedTensor:
    """Return the tensor that the chunks are.

    Raises:
        CheckpointError: They overlap, leave a gap, or are no part of their file.
    """
    chunks = [LazyChunk(name, saved.dtype, chunk) for chunk in saved.chunks]
    for one in saved.chunks:
        size = files.open(one.path).size
        if one.start + one.nbytes > size:
            raise CheckpointError(
                f"{one.path} has {size} bytes, and the chunk of {shortened(name)} in it ends at byte "
                f"{one.start + one.nbytes}."
            )
    if not chunks:
        raise CheckpointError(f"{folder} holds no chunk of {shortened(name)}.")
    try:
        whole = put_together([Box(one.place.offsets, one) for one in chunks])
    except CheckpointError as error:
        raise CheckpointError(f"Tensor {shortened(name)} in {folder} {error}.") from error
    if whole.shape != saved.shape:
        raise CheckpointError(
            f"{folder} holds chunks of {shortened(name)} that make up shape {list(whole.shape)} of {list(saved.shape)}."
        )
    if len(chunks) > 1:
        return whole
    only = whole.boxes[0]
    return replace(whole, boxes=(Box(only.offsets, chunks[0].opened(files)),))


@dataclass(frozen=True, slots=True)
class LazyChunk:
    """A chunk whose own table of contents is read when its elements are: a model may have 100,000 of them."""

    name: str
    dtype: torch.dtype
    place: Chunk

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.sizes

    def extent(self) -> Extent | None:
        return None

    def read(self, files: Files, rows: range) -> torch.Tensor:
        return self.opened(files).read(files, rows)

    def opened(self, files: Files) -> StoredTensor:
        """Return where its elements lie.

        Raises:
            CheckpointError: It is no such tensor as the metadata says.
        """
        whole = files.open(self.place.path)
        where = f"The chunk of {shortened(self.name)} at byte {self.place.start} of {self.place.path}"
        try:
            tensor = load(whole.path, _PartAlone(_Part(whole, self.place.start, self.place.nbytes)), ReadOptions())
        except CheckpointError as error:
            raise CheckpointError(f"{where} is no tensor that torch saved, or a damaged one.") from error
        if not isinstance(tensor, StoredTensor) or (tensor.shape, tensor.dtype) != (self.shape, self.dtype):
            found = f"{list(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, StoredTensor) else "no tensor"
            raise CheckpointError(f"{where} is {found}, and the metadata says {list(self.shape)} of {self.dtype}.")
        if tensor.storage.offset is None:
            raise CheckpointError(f"{where} has no elements.")
        return replace(tensor, storage=replace(tensor.storage, offset=tensor.storage.offset + self.place.start))


class _Part(OpenFile):
    """A part of an open file, read as if it were a file."""

    __slots__ = ("_start", "_whole")

    def __init__(self, whole: OpenFile, start: int, nbytes: int) -> None:
        self.path, self.size = whole.path, nbytes
        self._whole, self._start = whole, start
        self._descriptor = None

    def read(self, offset: int, nbytes: int) -> bytearray:
        self._require_range(offset, nbytes)
        return self._whole.read(self._start + offset, nbytes)


class _PartAlone(Files):
    """Opens nothing but the part."""

    def __init__(self, part: _Part) -> None:
        super().__init__()
        self._part = part

    def open(self, path: Path) -> OpenFile:
        return self._part


NOT_THE_MODEL = ("optim", "lr_scheduler", "scheduler", "dataloader", "train_state", "rng", "ema")
"""Starts of the keys under which trainers save what is not the model."""

Keys = tuple[str, ...]


class DcpFormat:
    """Opens what `dcp.save` wrote; of a nested state dict, the model."""

    name = "dcp"
    precedence = 35  # above pytorch, which takes any file of torch.save that lies in a folder alone

    def recognises(self, source: Any) -> bool:
        path = as_path(source)
        return path is not None and is_folder(path) and is_present(path / METADATA)

    def open(self, source: Any, options: ReadOptions) -> TableCheckpoint:
        files = Files()
        try:
            return _opened(Path(source), files, options)
        except BaseException:
            files.close()
            raise


def _opened(folder: Path, files: Files, options: ReadOptions) -> TableCheckpoint:
    saved = read_metadata(folder, files, options)
    model = model_names(folder, saved)
    tensors: dict[str, BoxedTensor] = {
        new: put_chunks_together(folder, old, saved.tensors[old], files)
        for old, new in model.names.items()
        if old in saved.tensors
    }
    unread = {new: saved.others[old] for old, new in model.names.items() if old in saved.others}
    num_files = len({chunk.path for old in model.names if old in saved.tensors for chunk in saved.tensors[old].chunks})
    description = f"torch.distributed.checkpoint, {num_files} files{model.description}"
    return TableCheckpoint(files, description, tensors, read_config(folder, files), unread=unread)


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The part of a saved state dict that is the model.

    Attributes:
        names: Names in the model by names in the checkpoint.
        description: Which part that is, where it is not everything.
    """

    names: Mapping[str, str]
    description: str


def model_names(folder: Path, saved: Saved) -> ModelNames:
    """Find the model in a state dict that may hold an optimizer, too.

    Raises:
        CheckpointError: There are several that could be the model.
    """
    keys = {name: saved.keys.get(name, (name,)) for name in (*saved.tensors, *saved.others)}
    prefix = _prefix(folder, {keys[name] for name in saved.tensors})
    if prefix is None:  # the model's own names, perhaps with an optimizer beside them
        names = {name: name for name, path in keys.items() if len(path) == 1 and not _is_other(path[0])}
        left_out = sorted({path[0] for name, path in keys.items() if name not in names})
        without = f", without {', '.join(map(repr, left_out[:5]))}" if left_out else ""
        return ModelNames(names, without if any(name in saved.tensors for name in names) else "")
    names = {
        name: ".".join(path[len(prefix) :])
        for name, path in keys.items()
        if path[: len(prefix)] == prefix and len(path) > len(prefix)
    }
    return ModelNames(names, f", under {'.'.join(prefix)!r}" if prefix else "")


def _prefix(folder: Path, paths: set[Keys]) -> Keys | None:
    """Return the keys that lead to the model; None where its names lie at the top."""
    by_name = {path[: i + 1] for path in paths for i, key in enumerate(path[:-1]) if key in KEYS}
    depth = min(map(len, by_name), default=0)
    nearest = sorted(prefix for prefix in by_name if len(prefix) == depth and not any(map(_is_other, prefix)))
    if not nearest and not any(len(path) == 1 for path in paths):
        nearest = sorted({path[:1] for path in paths if not _is_other(path[0])})
    if len(nearest) > 1:
        keys = ", ".join(repr(".".join(prefix)) for prefix in nearest[:5])
        raise CheckpointError(f"{folder} holds several state dicts, under {keys}.")
    return nearest[0] if nearest else None


def _is_other(key: str) -> bool:
    return key.startswith(NOT_THE_MODEL)
