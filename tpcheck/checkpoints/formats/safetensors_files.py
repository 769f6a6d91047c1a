"""Checkpoints in safetensors: one file, several with an index, or each rank's own shards.

The header is read here, since the library does not state where a tensor lies in the file and maps the whole file: one
that is truncated meanwhile would end the process with SIGBUS.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Extent, ReadOptions
from tpcheck.checkpoints.formats.file_checkpoint import (
    Chunk,
    ContiguousTensor,
    FileCheckpoint,
    tensor_from_chunks,
)
from tpcheck.checkpoints.formats.files import (
    MAX_JSON_NBYTES,
    Files,
    OpenFile,
    is_folder,
    is_sizes,
    merge_files,
    names_in,
    parse_json,
    read_config,
    read_index,
    shortened,
)
from tpcheck.checkpoints.formats.trainer_files import folder_states
from tpcheck.core.errors import CheckpointError

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",  # two elements in a byte, which torch counts as one
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Types of the format, and the dtypes of torch; tensors of a dtype that this torch lacks are unread."""

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8": 8, "BOOL": 8, "BF16": 16, "C64": 64}
"""Bits of a type, or of all types that start with it, where its name does not state them; torch has no F6."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file.

    Attributes:
        tensors: The tensors by name, in the order of the file.
        unread: The reason for each tensor of a type that torch lacks.
        metadata: Text that the writer added.
    """

    tensors: Mapping[str, ContiguousTensor]
    unread: Mapping[str, str]
    metadata: Mapping[str, str]


def read_header(file: OpenFile) -> Header:
    """Read the header of a file.

    Raises:
        CheckpointError: The header is damaged, or does not describe the bytes behind it.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.path} has {file.size} bytes, which is too short for a safetensors file.")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise CheckpointError(
            f"{file.path} is truncated or not a safetensors file: its header should have {length} bytes, "
            f"but the whole file has {file.size}."
        )
    if length > MAX_JSON_NBYTES:
        raise CheckpointError(f"{file.path} has a header of {length} bytes, which is more than any model needs.")
    data = file.read(8, length)
    if not data.startswith(b"{"):
        raise CheckpointError(f"{file.path} is not a safetensors file: its header is not a JSON object.")
    table = parse_json(data, f"The header of {file.path}", strict=True)
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{file.path} has metadata that is not text.")
    start = 8 + length
    entries = sorted(
        (_parse_entry(file, name, entry, start) for name, entry in table.items()), key=lambda parsed: parsed.span
    )
    _require_cover(file, entries, start)
    return Header(
        {entry.name: entry.tensor for entry in entries if isinstance(entry.tensor, ContiguousTensor)},
        {entry.name: entry.tensor for entry in entries if isinstance(entry.tensor, str)},
        metadata,
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the header: a tensor, or why it cannot be read, and its first and last byte behind the header."""

    name: str
    span: tuple[int, int]
    tensor: ContiguousTensor | str


def _parse_entry(file: OpenFile, name: str, entry: Any, start: int) -> _Entry:
    """Return an entry of a header that ends at byte `start`; any of its fields may be wrong."""
    if not isinstance(entry, dict) or {*entry} != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, name, "is not described by dtype, shape and data_offsets")
    shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not is_sizes(shape) or prod(size for size in shape if size) >= 1 << 60:
        raise _damaged(file, name, f"has the shape {_as_text(shape)}")
    if not is_sizes(offsets) or len(offsets) != 2:
        raise _damaged(file, name, f"has the offsets {_as_text(offsets)}")
    begin, end = offsets
    if not begin <= end <= file.size - start:
        raise _damaged(file, name, f"has the offsets {_as_text(offsets)}, beyond the {file.size - start} bytes")
    bits = _bits(kind) if isinstance(kind, str) else None
    if bits is None:
        raise _damaged(file, name, f"is of an unknown type {shortened(kind)}")
    if prod(shape) * bits != (end - begin) * 8:
        raise _damaged(file, name, f"has {end - begin} bytes, not those of the shape {_as_text(shape)} in {kind}")
    dtype = getattr(torch, DTYPES.get(kind, ""), None)
    if kind == "F4":
        shape = [*shape[:-1], shape[-1] // 2] if shape and shape[-1] % 2 == 0 else None
    if dtype is None or shape is None:
        return _Entry(name, (begin, end), f"is of type {kind}, which torch {torch.__version__} does not have")
    place = Extent(file.path, start + begin, end - begin)
    return _Entry(name, (begin, end), ContiguousTensor(place, tuple(shape), dtype))


def _require_cover(file: OpenFile, entries: list[_Entry], start: int) -> None:
    expected = 0
    for entry in entries:
        begin, end = entry.span
        if begin != expected:
            problem = "overlaps the one before it" if begin < expected else "leaves a gap before it"
            raise _damaged(file, entry.name, f"{problem}, at byte {begin} of the data")
        expected = end
    if start + expected != file.size:
        raise CheckpointError(
            f"{file.path} has {file.size - start - expected} bytes after its last tensor that belong to none."
        )


def _bits(kind: str) -> int | None:
    if kind not in DTYPES and kind not in _BITS:
        return None
    return _BITS.get(kind) or _BITS.get(kind.partition("_")[0]) or int(kind[1:])


def _damaged(file: OpenFile, name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{file.path} is damaged: tensor {shortened(name)} {problem}.")


def _as_text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list) and len(value) <= 64 else shortened(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
OTHER_FORMATS = re.compile(r"shard-\d+-model-.*|adapter_model\..*")
"""Files of `TransformersShardsFormat` and `PeftFormat`."""


class SafetensorsFormat:
    """Opens files of `save_pretrained` and `safetensors.torch.save_file`."""

    name = "safetensors"
    precedence = 60

    def recognises(self, source: Any) -> bool:
        if not isinstance(source, Path):
            return False
        return bool(_model_files(names_in(source) if is_folder(source) else [source.name]))

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            checkpoint = _open(_main_file(source), files)
            return replace(checkpoint, read_states=lambda: folder_states(source, files, options, checkpoint.tensors))


def _open(path: Path, files: Files) -> FileCheckpoint:
    if path.name.endswith(INDEX_SUFFIX):
        files_of = read_index(path, files)
        tensors, unread = merge_files(path, files_of, lambda file: read_header(files.open(file)))
        description = f"safetensors, {len({*files_of.values()})} files with an index"
    else:
        header = read_header(files.open(path))
        tensors, unread, description = header.tensors, header.unread, "safetensors, 1 file"
    return FileCheckpoint(files, description, tensors, read_config(path.parent, files), unread=unread)


def _model_files(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((SUFFIX, INDEX_SUFFIX)) and not OTHER_FORMATS.fullmatch(name)]


def _main_file(source: Path) -> Path:
    """Return the file of the model, or its index.

    `model.safetensors` has precedence over an index, as in transformers' `from_pretrained`.
    """
    if not is_folder(source):
        return source
    names = _model_files(names_in(source))
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    single = [name for name in names if name not in indexes]
    for choice in (["model.safetensors"], ["model.safetensors.index.json"], indexes, single):
        present = [name for name in choice if name in names]
        if len(present) == 1:
            return source / present[0]
        if present:
            break
    several = "indexes" if indexes else "safetensors files and no index"
    raise CheckpointError(f"{source} holds {len(indexes or single)} {several}, so the model is ambiguous.")


SHARD = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
SHARDING = "DCP_SHARDING_INFO"


class TransformersShardsFormat:
    """Opens a folder of `shard-*.safetensors`: `save_pretrained(..., distributed_checkpoint=True)` of transformers.

    Every file holds its rank's chunk of a tensor under the tensor's name, and in its metadata the place of the chunk
    (torch/distributed/checkpoint/_hf_utils.py). Nothing but the chunks states the shape of a tensor.
    """

    name = "transformers-shards"
    precedence = 50  # below safetensors: a model that was consolidated beside its shards is read in place of them

    def recognises(self, source: Any) -> bool:
        return is_folder(source) and any(map(SHARD.fullmatch, names_in(source)))

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            return _open_shards(source, files)


def _open_shards(folder: Path, files: Files) -> FileCheckpoint:
    matches = [match for match in map(SHARD.fullmatch, names_in(folder)) if match]
    if len({match[3] for match in matches}) > 1:
        raise CheckpointError(
            f"{folder} holds shards of several checkpoints: their names state different numbers of files."
        )
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    unread: dict[str, str] = {}
    for match in matches:
        path = folder / match.string
        header = read_header(files.open(path))
        unread.update(header.unread)
        offsets = _offsets(path, header)
        for name, tensor in header.tensors.items():
            if name not in offsets:
                raise CheckpointError(f"{path} does not state the offsets of its chunk of tensor {shortened(name)}.")
            chunks[name].append(Chunk(_checked_offsets(path, name, offsets[name], len(tensor.shape)), tensor))
    missing = _missing_shards(matches)
    tensors = {name: tensor_from_chunks(name, f"{folder}{missing}", parts) for name, parts in chunks.items()}
    description = f"transformers shards, {len(matches)} files{missing}"
    return FileCheckpoint(files, description, tensors, read_config(folder, files), unread=unread)


def _missing_shards(matches: list[re.Match[str]]) -> str:
    """Return which shards are missing, in words: they are numbered from 1, and a rank without tensors writes none."""
    present = {int(match[1]) for match in matches}
    missing = [str(shard) for shard in range(1, max(present)) if shard not in present]
    return f" (without shard {', '.join(missing[:5])})" if missing else ""


def _offsets(path: Path, header: Header) -> Mapping[str, Any]:
    text = header.metadata.get(SHARDING)
    if text is None:
        raise CheckpointError(f"{path} does not state the offsets of its chunks: its metadata has no {SHARDING}.")
    return parse_json(text.encode(), f"{SHARDING} of {path}", strict=True)


def _checked_offsets(path: Path, name: str, entry: Any, dims: int) -> tuple[int, ...]:
    offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
    if not is_sizes(offsets) or len(offsets) != dims:
        raise CheckpointError(f"{path} gives tensor {shortened(name)} offsets that are not {dims} indices.")
    return tuple(offsets)
