"""Adapters that PEFT saved: the tensors of the adapter under the names that PEFT gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats import torch_files
from tpcheck.checkpoints.formats.file_checkpoint import FileCheckpoint
from tpcheck.checkpoints.formats.files import Files, is_folder, names_in, read_config
from tpcheck.checkpoints.formats.safetensors_files import read_header
from tpcheck.checkpoints.formats.torch_files import state_dict, ties
from tpcheck.checkpoints.formats.trainer_files import folder_states

FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"


class PeftFormat:
    """Opens a folder with `adapter_model.safetensors` or `adapter_model.bin`, or the file itself."""

    name = "peft"
    precedence = 55  # below safetensors: where a model is beside its adapter, the model is read

    def recognises(self, source: Any) -> bool:
        return isinstance(source, Path) and _main_file(source) is not None

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            checkpoint = _open(_main_file(source) or source, files, options)
            return replace(checkpoint, read_states=lambda: folder_states(source, files, options, checkpoint.tensors))


def _open(path: Path, files: Files, options: ReadOptions) -> FileCheckpoint:
    config = read_config(path.parent, files, CONFIG)
    kind = config.get("peft_type")
    description = "PEFT adapter" + (f", {kind}" if isinstance(kind, str) and kind.isidentifier() else "")
    if path.name.endswith(".safetensors"):
        header = read_header(files.open(path))
        return FileCheckpoint(files, f"{description}, safetensors", header.tensors, config, unread=header.unread)
    state = state_dict(torch_files.load(path, files, options), path)
    return FileCheckpoint(files, f"{description}, PyTorch", state.tensors, config, ties(state.tensors), state.unread)


def _main_file(path: Path) -> Path | None:
    if not is_folder(path):
        return path if path.name in FILES else None
    names = names_in(path)
    return next((path / name for name in FILES if name in names), None)
