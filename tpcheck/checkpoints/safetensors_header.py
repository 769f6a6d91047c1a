"""The table of contents of a safetensors file, checked as strictly as the library in Rust does, and without mapping it.

https://huggingface.co/docs/safetensors/index#format: the length of a JSON header, the header, then all tensors
without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from tpcheck.adapters import Extent
from tpcheck.checkpoints.files import OpenFile, shortened
from tpcheck.checkpoints.strict_json import LARGEST_JSON, parsed
from tpcheck.checkpoints.table import WholeTensor
from tpcheck.errors import CheckpointError

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
