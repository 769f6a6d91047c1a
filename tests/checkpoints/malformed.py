"""Write files that are malformed on purpose."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.reading import read_all
from tpcheck import CheckpointError


def write_safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a file with this header (JSON, text or bytes), whether or not it describes the data."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@dataclass(frozen=True)
class StorageOf:
    """Pickles as a reference to a storage of float32, as in a file of torch."""

    numel: Any
    key: Any = "0"


@dataclass(frozen=True)
class Calls:
    """Pickles as a call of this function."""

    function: Any
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def view(numel: Any, start: Any, shape: Any, stride: Any) -> Calls:
    """Return an object that pickles as a tensor of a storage, valid or not."""
    arguments = (StorageOf(numel), start, shape, stride, False, OrderedDict())
    return Calls(torch._utils._rebuild_tensor_v2, arguments)


class TorchPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", torch.FloatStorage, value.key, "cpu", value.numel) if isinstance(value, StorageOf) else None


def write_torch_zip(
    path: Path, structure: Any, records: Mapping[str, bytes] | None = None, *, compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write a zip file as torch.save does, but with any pickle (an object or its bytes) and any records."""
    data = structure
    if not isinstance(structure, bytes):
        with (path.parent / "pickle").open("wb") as file:
            TorchPickler(file, protocol=2).dump(structure)
        data = (path.parent / "pickle").read_bytes()
        (path.parent / "pickle").unlink()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in {"data.pkl": data, "byteorder": b"little", **(records or {})}.items():
            archive.writestr(f"archive/{name}", record)
    return path


class RemovesFile:
    """Removes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> Any:
        return os.remove, (self._path,)


def assert_refused(source: Path, message: str) -> None:
    """Assert that reading the source ends in one sentence that matches the message."""
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_all(source)
    text = str(refusal.value)
    assert "\n" not in text
    assert text.endswith(".")
