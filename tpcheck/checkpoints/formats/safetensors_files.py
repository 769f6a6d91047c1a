"""Checkpoints in safetensors: one file, or several with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Extent, ReadOptions
from tpcheck.checkpoints.formats.files import Files, OpenFile, as_path, is_folder, names_in, shortened
from tpcheck.checkpoints.formats.json_files import LARGEST_JSON, gathered, parsed, read_config, read_index
from tpcheck.checkpoints.formats.table import TableCheckpoint, WholeTensor
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
"""Names of the format, and torch's; those that this torch does not have are unread."""

WITHOUT_TORCH_DTYPE = {"F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of the format's types that no torch has."""


@dataclass(frozen=True, slots=True)
class Header:
    """What one file holds.

    Attributes:
        tensors: By name, in the order in which they lie in the file.
        unread: Tensors of a type that torch does not have, with the reason.
        metadata: What the writer said of itself.
    """

    tensors: Mapping[str, WholeTensor]
    unread: Mapping[str, str]
    metadata: Mapping[str, str]


def read_header(file: OpenFile) -> Header:
    """Return what the file holds.

    Raises:
        CheckpointError: The header is damaged, or does not describe the bytes that follow it.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.path} has {file.size} bytes, which is too short for a safetensors file.")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise CheckpointError(
            f"{file.path} is truncated or no safetensors file: its header should have {length} bytes, "
            f"and the whole file has {file.size}."
        )
    if length > LARGEST_JSON:
        raise CheckpointError(f"{file.path} has a header of {length} bytes, which is more than any model needs.")
    data = file.read(8, length)
    if not data.startswith(b"{"):
        raise CheckpointError(f"{file.path} is no safetensors file: its header is not a JSON object.")
    table = parsed(data, f"The header of {file.path}", strict=True)
    metadata = _metadata(table.pop("__metadata__", {}), file)
    described = [_Described(file, name, entry, 8 + length) for name, entry in table.items()]
    described.sort(key=lambda one: (one.begin, one.end))
    _require_cover(file, described, 8 + length)
    return Header(
        {one.name: one.tensor for one in described if one.tensor is not None},
        {one.name: one.reason for one in described if one.tensor is None},
        metadata,
    )


class _Described:
    """One entry of the header, of which every field may be a lie."""

    __slots__ = ("begin", "end", "name", "reason", "tensor")

    def __init__(self, file: OpenFile, name: str, entry: Any, start: int) -> None:
        self.name = name
        if not isinstance(entry, dict) or {*entry} != {"dtype", "shape", "data_offsets"}:
            raise _damaged(file, name, "is not described by dtype, shape and data_offsets")
        shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not _are_sizes(shape) or prod(size for size in shape if size) >= 1 << 60:
            raise _damaged(file, name, f"has the shape {_as_text(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise _damaged(file, name, f"has the offsets {_as_text(offsets)}")
        self.begin, self.end = offsets
        if not self.begin <= self.end <= file.size - start:
            raise _damaged(file, name, f"has the offsets {_as_text(offsets)}, beyond the {file.size - start} bytes")
        bits = _bits(kind) if isinstance(kind, str) else None
        if bits is None:
            raise _damaged(file, name, f"is of an unknown type {shortened(kind)}")
        if prod(shape) * bits != (self.end - self.begin) * 8:
            raise _damaged(
                file, name, f"has {self.end - self.begin} bytes, not those of the shape {_as_text(shape)} in {kind}"
            )
        dtype = getattr(torch, DTYPES.get(kind, ""), None)
        self.reason = f"is of type {kind}, which torch {torch.__version__} does not have"
        self.tensor: WholeTensor | None = None
        if kind == "F4":
            shape = [*shape[:-1], shape[-1] // 2] if shape and shape[-1] % 2 == 0 else None
        if dtype is not None and shape is not None:
            place = Extent(file.path, start + self.begin, self.end - self.begin)
            self.tensor = WholeTensor(place, tuple(shape), dtype)


def _require_cover(file: OpenFile, described: list[_Described], start: int) -> None:
    expected = 0
    for one in described:
        if one.begin != expected:
            problem = "overlaps the one before it" if one.begin < expected else "leaves a gap before it"
            raise _damaged(file, one.name, f"{problem}, at byte {one.begin} of the data")
        expected = one.end
    if start + expected != file.size:
        raise CheckpointError(
            f"{file.path} has {file.size - start - expected} bytes after its last tensor that belong to none."
        )


def _bits(kind: str) -> int | None:
    if kind in WITHOUT_TORCH_DTYPE:
        return WITHOUT_TORCH_DTYPE[kind]
    if kind == "F4":
        return 4
    sizes = {"F8": 8, "BOOL": 8, "BF16": 16, "C64": 64}
    if kind not in DTYPES:
        return None
    return sizes.get(kind.partition("_")[0]) or int(kind[1:])


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(one) is int and 0 <= one < 1 << 62 for one in value)
    )


def _metadata(value: Any, file: OpenFile) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise CheckpointError(f"{file.path} has metadata that is not text.")
    return value


def _damaged(file: OpenFile, name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{file.path} is damaged: tensor {shortened(name)} {problem}.")


def _as_text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list) and len(value) <= 64 else shortened(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
OF_OTHER_FORMATS = re.compile(r"shard-\d+-model-.*|adapter_model\..*")
"""Files of `transformers_shards` and `peft`."""


class SafetensorsFormat:
    """Opens what `save_pretrained` and `safetensors.torch.save_file` write."""

    name = "safetensors"
    precedence = 60

    def recognises(self, source: Any) -> bool:
        path = as_path(source)
        if path is None:
            return False
        if is_folder(path):
            return bool(_of_model(names_in(path)))
        return bool(_of_model([path.name]))

    def open(self, source: Any, options: ReadOptions) -> TableCheckpoint:
        files = Files()
        try:
            return _opened(_main_file(Path(source)), files)
        except BaseException:
            files.close()
            raise


def _opened(path: Path, files: Files) -> TableCheckpoint:
    unread: dict[str, str] = {}
    if path.name.endswith(INDEX_SUFFIX):
        files_of = read_index(path, files)
        tensors = gathered(path, files_of, lambda file: _held(file, files, unread))
        for name in [name for name in tensors if name not in files_of]:
            unread[name] = f"{path.name} does not list it, though one of its files holds it"
            del tensors[name]
        description = f"safetensors, {len({*files_of.values()})} files with an index"
    else:
        tensors = dict(_held(path, files, unread))
        description = "safetensors, 1 file"
    readable = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return TableCheckpoint(files, description, readable, read_config(path.parent, files), unread=unread)


def _held(path: Path, files: Files, unread: dict[str, str]) -> Mapping[str, WholeTensor | None]:
    header = read_header(files.open(path))
    unread.update(header.unread)
    return {**header.tensors, **dict.fromkeys(header.unread)}


def _of_model(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((SUFFIX, INDEX_SUFFIX)) and not OF_OTHER_FORMATS.fullmatch(name)]


def _main_file(source: Path) -> Path:
    """Return what stands for the whole model: a file that is given or the only one, else the index.

    `model.safetensors` goes before an index, as in transformers' `from_pretrained`.
    """
    if not is_folder(source):
        return source
    names = _of_model(names_in(source))
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    whole = [name for name in names if name not in indexes]
    for choice in (["model.safetensors"], ["model.safetensors.index.json"], indexes, whole):
        present = [name for name in choice if name in names]
        if len(present) == 1:
            return source / present[0]
        if present:
            break
    what = "indexes" if indexes else "safetensors files and no index"
    raise CheckpointError(f"{source} holds {len(indexes or whole)} {what}, so that none stands for the whole model.")
