"""Checkpoints of transformers' `save_pretrained(..., distributed_checkpoint=True)`: each rank's own safetensors file.

Every file holds its rank's piece of a tensor under the tensor's name; where the piece lies is in the file's metadata
(torch/distributed/checkpoint/filesystem.py, `DCP_SHARDING_INFO`). Only the pieces say how large a tensor is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.files import Files, as_path, is_folder, names_in, shortened
from tpcheck.checkpoints.formats.json_files import parsed, read_config
from tpcheck.checkpoints.formats.safetensors_files import Header, read_header
from tpcheck.checkpoints.formats.table import Box, BoxedTensor, TableCheckpoint, put_together
from tpcheck.core.errors import CheckpointError

SHARD = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
SHARDING = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"


class TransformersShardsFormat:
    """Opens a folder of `shard-*.safetensors`."""

    name = "transformers-shards"
    precedence = 50  # below whole safetensors: what was consolidated beside its shards is read from there

    def recognises(self, source: Any) -> bool:
        path = as_path(source)
        return path is not None and is_folder(path) and any(map(SHARD.fullmatch, names_in(path)))

    def open(self, source: Any, options: ReadOptions) -> TableCheckpoint:
        files = Files()
        try:
            return _opened(Path(source), files)
        except BaseException:
            files.close()
            raise


def _opened(folder: Path, files: Files) -> TableCheckpoint:
    matches = [match for match in map(SHARD.fullmatch, names_in(folder)) if match]
    if len({match[3] for match in matches}) > 1:
        raise CheckpointError(f"{folder} holds shards of several checkpoints: their names count different files.")
    boxes: dict[str, list[Box]] = defaultdict(list)
    unread: dict[str, str] = {}
    for match in matches:
        path = folder / match.string
        header = read_header(files.open(path))
        unread.update(header.unread)
        offsets = _offsets(path, header)
        for name, tensor in header.tensors.items():
            if name not in offsets:
                raise CheckpointError(f"{path} does not say where its piece of tensor {shortened(name)} lies.")
            boxes[name].append(Box(_checked(path, name, offsets[name], len(tensor.shape)), tensor))
    missing = _missing_shards(matches)
    tensors = {name: _whole(f"{folder}{missing}", name, of_tensor) for name, of_tensor in boxes.items()}
    description = f"transformers shards, {len(matches)} files{missing}"
    return TableCheckpoint(files, description, tensors, read_config(folder, files), unread=unread)


def _missing_shards(matches: list[re.Match[str]]) -> str:
    """Say which shards are not there: they are numbered from 1 by rank, and a rank with nothing to save writes none."""
    present = {int(match[1]) for match in matches}
    missing = [str(shard) for shard in range(1, max(present)) if shard not in present]
    return f" (without shard {', '.join(missing[:5])})" if missing else ""


def _offsets(path: Path, header: Header) -> Mapping[str, Any]:
    text = header.metadata.get(SHARDING)
    if text is None:
        raise CheckpointError(f"{path} does not say where its pieces lie: its metadata has no {SHARDING}.")
    return parsed(text.encode(), f"{SHARDING} of {path}", strict=True)


def _checked(path: Path, name: str, entry: Any, dims: int) -> tuple[int, ...]:
    offsets = entry.get(OFFSETS) if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != dims
        or not all(type(one) is int and 0 <= one < 1 << 48 for one in offsets)
    ):
        raise CheckpointError(f"{path} gives tensor {shortened(name)} offsets that are not {dims} indices.")
    return tuple(offsets)


def _whole(where: str, name: str, boxes: list[Box]) -> BoxedTensor:
    try:
        return put_together(boxes)
    except CheckpointError as error:
        raise CheckpointError(f"Tensor {shortened(name)} in {where} {error}.") from error
