"""Opens checkpoints as tpcheck does, reads them whole, and writes files that lie."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, CheckpointFormat, ReadOptions
from tpcheck.checkpoints.formats.live import LiveFormat
from tpcheck.checkpoints.formats.peft import PeftFormat
from tpcheck.checkpoints.formats.pytorch_files import PytorchFormat
from tpcheck.checkpoints.formats.safetensors_files import SafetensorsFormat
from tpcheck.checkpoints.formats.transformers_shards import TransformersShardsFormat

FORMATS: tuple[CheckpointFormat, ...] = (
    LiveFormat(),
    SafetensorsFormat(),
    PeftFormat(),
    TransformersShardsFormat(),
    PytorchFormat(),
)


def opened(source: Any, *, allow_pickle: bool = False) -> Checkpoint:
    """Open with the format that goes first among those that recognise the source."""
    recognised = sorted((one for one in FORMATS if one.recognises(source)), key=lambda one: -one.precedence)
    assert recognised, f"{source} is recognised by no format"
    return recognised[0].open(source, ReadOptions(allow_pickle=allow_pickle))


def tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    shape = checkpoint.shape(name)
    return checkpoint.read(name, range(shape[0] if shape else 1))


def contents(source: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Read every tensor, and close the checkpoint."""
    checkpoint = opened(source, **options)
    try:
        return {name: tensor(checkpoint, name) for name in checkpoint.names()}
    finally:
        checkpoint.close()


def bits(one: torch.Tensor) -> torch.Tensor:
    return one.detach().contiguous().reshape(-1).view(torch.uint8)


def same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Return whether names, shapes, dtypes and bits are the same."""
    return {*actual} == {*expected} and all(
        actual[name].shape == one.shape
        and actual[name].dtype == one.dtype
        and torch.equal(bits(actual[name]), bits(one))
        for name, one in expected.items()
    )


def write_safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a file with this header (JSON, text or bytes), which may say anything of the data."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@dataclass(frozen=True)
class StorageOf:
    """A storage of float32, as a pickle of torch refers to one."""

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
    """Return what pickles as a tensor of a storage, valid or not."""
    arguments = (StorageOf(numel), start, shape, stride, False, OrderedDict())
    return Calls(torch._utils._rebuild_tensor_v2, arguments)


class TorchPickler(pickle.Pickler):
    def persistent_id(self, one: Any) -> Any:
        return ("storage", torch.FloatStorage, one.key, "cpu", one.numel) if isinstance(one, StorageOf) else None


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
