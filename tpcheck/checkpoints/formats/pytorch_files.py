"""Checkpoints of `torch.save`: `pytorch_model.bin`, its index, and any other file with a state dict."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions, TrainingStates
from tpcheck.checkpoints.formats import torch_files
from tpcheck.checkpoints.formats.file_checkpoint import FileCheckpoint
from tpcheck.checkpoints.formats.files import (
    Files,
    is_folder,
    merge_files,
    names_in,
    read_config,
    read_index,
)
from tpcheck.checkpoints.formats.torch_files import StateDict, state_dict, ties
from tpcheck.checkpoints.formats.trainer_files import folder_states
from tpcheck.checkpoints.formats.training_states import StateTable

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
            checkpoint = _open(_main_file(source) or source, files, options)
            if checkpoint.read_states is not None or not is_folder(source):
                return checkpoint
            return replace(checkpoint, read_states=lambda: folder_states(source, files, options, checkpoint.tensors))


def _open(path: Path, files: Files, options: ReadOptions) -> FileCheckpoint:
    def read(file: Path) -> StateDict:
        return state_dict(torch_files.load(file, files, options), file)

    states: Callable[[], TrainingStates | None] | None = None
    if path.name.endswith(INDEX_SUFFIX):
        files_of = read_index(path, files)
        tensors, unread = merge_files(path, files_of, read)
        description = f"PyTorch, {len({*files_of.values()})} files with an index"
    else:
        saved = torch_files.load(path, files, options)
        state = state_dict(saved, path)
        if state.key is not None:
            states = partial(_other_states, saved, state, files)
        tensors, unread = state.tensors, state.unread
        description = "PyTorch, 1 file" + (f", under {state.key!r}" if state.key else "")
    return FileCheckpoint(
        files, description, tensors, read_config(path.parent, files), ties(tensors), unread, read_states=states
    )


def _other_states(saved: Mapping[Any, Any], model: StateDict, files: Files) -> TrainingStates | None:
    """Return what the file holds beside the model's state dict."""
    table = StateTable()
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    table.add_entries({key: value for key, value in saved.items() if key != model.key}, files, shapes)
    return table.states(files)


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
