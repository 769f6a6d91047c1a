"""Adapters that PEFT saved: their own tensors, under the names that PEFT gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats import torch_files
from tpcheck.checkpoints.formats.files import Files, as_path, is_folder, names_in
from tpcheck.checkpoints.formats.json_files import read_config
from tpcheck.checkpoints.formats.safetensors_files import read_header
from tpcheck.checkpoints.formats.table import TableCheckpoint
from tpcheck.checkpoints.formats.torch_files import state_dict, ties

IN_ORDER = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"


class PeftFormat:
    """Opens a folder with `adapter_model.safetensors` or `adapter_model.bin`, or the file itself."""

    name = "peft"
    precedence = 55  # below whole safetensors: where a model lies beside its adapter, the model is read

    def recognises(self, source: Any) -> bool:
        path = as_path(source)
        return path is not None and _main_file(path) is not None

    def open(self, source: Any, options: ReadOptions) -> TableCheckpoint:
        path = _main_file(Path(source)) or Path(source)
        files = Files()
        try:
            return _opened(path, files, options)
        except BaseException:
            files.close()
            raise


def _opened(path: Path, files: Files, options: ReadOptions) -> TableCheckpoint:
    config = read_config(path.parent, files, CONFIG)
    kind = config.get("peft_type")
    description = "PEFT adapter" + (f", {kind}" if isinstance(kind, str) and kind.isidentifier() else "")
    if path.name.endswith(".safetensors"):
        header = read_header(files.open(path))
        return TableCheckpoint(files, f"{description}, safetensors", header.tensors, config, unread=header.unread)
    held = state_dict(torch_files.load(path, files, options), path)
    return TableCheckpoint(files, f"{description}, PyTorch", held.tensors, config, ties(held.tensors), held.unread)


def _main_file(path: Path) -> Path | None:
    if not is_folder(path):
        return path if path.name in IN_ORDER else None
    names = names_in(path)
    return next((path / name for name in IN_ORDER if name in names), None)
