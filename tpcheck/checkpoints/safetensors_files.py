"""Checkpoints in safetensors: one file, or several with an index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcheck.adapters import ReadOptions
from tpcheck.checkpoints.files import Files
from tpcheck.checkpoints.folders import as_path, is_folder, names_in
from tpcheck.checkpoints.index import gathered, read_index
from tpcheck.checkpoints.safetensors_header import read_header
from tpcheck.checkpoints.strict_json import read_config
from tpcheck.checkpoints.table import TableCheckpoint, WholeTensor
from tpcheck.errors import CheckpointError

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
