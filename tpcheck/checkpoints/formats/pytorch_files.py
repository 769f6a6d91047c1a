"""Checkpoints of `torch.save`: `pytorch_model.bin`, in one file or several, and any file that holds a state dict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats import torch_files
from tpcheck.checkpoints.formats.files import Files, as_path, is_folder, names_in
from tpcheck.checkpoints.formats.json_files import gathered, read_config, read_index
from tpcheck.checkpoints.formats.stored import StoredTensor
from tpcheck.checkpoints.formats.table import TableCheckpoint
from tpcheck.checkpoints.formats.torch_files import StateDict, state_dict, ties

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIX = ".bin.index.json"
IN_ORDER = ("pytorch_model.bin", "pytorch_model.bin.index.json")
NOT_MODELS = re.compile(
    r"adapter_model\.bin|training_args\.bin|(optimizer|scheduler|scaler|rng_state|random_states).*"
    r"|.*(mp_rank_\d+|zero_pp_rank_\d+).*|.*_states\.pt"
)
"""What the Trainer, PEFT and DeepSpeed write beside a model, or instead of one."""


class PytorchFormat:
    """Opens files of `torch.save`."""

    name = "pytorch"
    precedence = 30

    def recognises(self, source: Any) -> bool:
        path = as_path(source)
        if path is None:
            return False
        return _main_file(path) is not None if is_folder(path) else path.name.endswith((*SUFFIXES, INDEX_SUFFIX))

    def open(self, source: Any, options: ReadOptions) -> TableCheckpoint:
        path = Path(source)
        files = Files()
        try:
            return _opened(_main_file(path) or path, files, options)
        except BaseException:
            files.close()
            raise


def _opened(path: Path, files: Files, options: ReadOptions) -> TableCheckpoint:
    if not path.name.endswith(INDEX_SUFFIX):
        held = state_dict(torch_files.load(path, files, options), path)
        description = "PyTorch, 1 file" + (f", under {held.key!r}" if held.key else "")
        return _table(files, description, path, dict(held.tensors), dict(held.unread))
    files_of = read_index(path, files)
    entries = gathered(path, files_of, lambda file: _entries(state_dict(torch_files.load(file, files, options), file)))
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, StoredTensor)}
    unread = {name: entry for name, entry in entries.items() if isinstance(entry, str)}
    for name in [name for name in tensors if name not in files_of]:
        unread[name] = f"{path.name} does not list it, though one of its files holds it"
        del tensors[name]
    description = f"PyTorch, {len({*files_of.values()})} files with an index"
    return _table(files, description, path, tensors, unread)


def _table(
    files: Files, description: str, path: Path, tensors: dict[str, StoredTensor], unread: dict[str, str]
) -> TableCheckpoint:
    config = read_config(path.parent, files)
    return TableCheckpoint(files, description, tensors, config, ties(tensors), unread)


def _entries(held: StateDict) -> dict[str, StoredTensor | str]:
    return {**held.tensors, **held.unread}


def _main_file(path: Path) -> Path | None:
    """Return what stands for the whole model in a folder: by its name, or as the only one of its kind."""
    if not is_folder(path):
        return None
    names = names_in(path)
    for name in IN_ORDER:
        if name in names:
            return path / name
    others = [name for name in names if name.endswith(SUFFIXES) and not NOT_MODELS.fullmatch(name)]
    return path / others[0] if len(others) == 1 else None
