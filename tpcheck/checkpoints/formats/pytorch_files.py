"""Checkpoints of `torch.save`: `pytorch_model.bin`, its index, and any other file with a state dict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats import torch_files
from tpcheck.checkpoints.formats.file_checkpoint import FileCheckpoint
from tpcheck.checkpoints.formats.files import Files, is_folder, names_in
from tpcheck.checkpoints.formats.json_files import merge_files, not_in_index, read_config, read_index
from tpcheck.checkpoints.formats.storage_view import StorageView
from tpcheck.checkpoints.formats.torch_files import state_dict, ties

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIX = ".bin.index.json"
FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
NOT_MODELS = re.compile(
    r"adapter_model\.bin|training_args\.bin|(optimizer|scheduler|scaler|rng_state|random_states).*"
    r"|.*(mp_rank_\d+|zero_pp_rank_\d+).*|.*_states\.pt"
)
"""Files that the Trainer, PEFT and DeepSpeed write beside a model, or instead of one."""


class PytorchFormat:
    """Opens files of `torch.save`."""

    name = "pytorch"
    precedence = 30

    def recognises(self, source: Any) -> bool:
        return isinstance(source, Path) and _main_file(source) is not None

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            return _open(_main_file(source) or source, files, options)


def _open(path: Path, files: Files, options: ReadOptions) -> FileCheckpoint:
    if path.name.endswith(INDEX_SUFFIX):
        files_of = read_index(path, files)
        entries = merge_files(path, files_of, lambda file: _entries(file, files, options))
        entries |= {name: not_in_index(path) for name in entries if name not in files_of}
        description = f"PyTorch, {len({*files_of.values()})} files with an index"
    else:
        state = state_dict(torch_files.load(path, files, options), path)
        entries = {**state.tensors, **state.unread}
        description = "PyTorch, 1 file" + (f", under {state.key!r}" if state.key else "")
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, StorageView)}
    unreadable = {name: entry for name, entry in entries.items() if isinstance(entry, str)}
    return FileCheckpoint(files, description, tensors, read_config(path.parent, files), ties(tensors), unreadable)


def _entries(path: Path, files: Files, options: ReadOptions) -> dict[str, StorageView | str]:
    """Return each tensor of a file, or the reason why it cannot be read."""
    state = state_dict(torch_files.load(path, files, options), path)
    return {**state.tensors, **state.unread}


def _main_file(path: Path) -> Path | None:
    """Return the file of the model: one of the usual names in a folder, or else its only file of `torch.save`."""
    if not is_folder(path):
        return path if path.name.endswith((*SUFFIXES, INDEX_SUFFIX)) else None
    names = names_in(path)
    for name in FILES:
        if name in names:
            return path / name
    others = [name for name in names if name.endswith(SUFFIXES) and not NOT_MODELS.fullmatch(name)]
    return path / others[0] if len(others) == 1 else None
