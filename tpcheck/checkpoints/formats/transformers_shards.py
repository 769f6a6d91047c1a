"""Checkpoints of transformers' `save_pretrained(..., distributed_checkpoint=True)`: each rank's own safetensors file.

Every file holds its rank's chunk of a tensor under the tensor's name, and in its metadata the place of the chunk
(`DCP_SHARDING_INFO`, torch/distributed/checkpoint/_hf_utils.py). Nothing but the chunks states the shape of a tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.file_checkpoint import Chunk, ChunkedTensor, FileCheckpoint, tensor_from_chunks
from tpcheck.checkpoints.formats.files import Files, is_folder, names_in, shortened
from tpcheck.checkpoints.formats.json_files import parse_json, read_config
from tpcheck.checkpoints.formats.safetensors_files import Header, read_header
from tpcheck.core.errors import CheckpointError

SHARD = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
SHARDING = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"


class TransformersShardsFormat:
    """Opens a folder of `shard-*.safetensors`."""

    name = "transformers-shards"
    precedence = 50  # below safetensors: a model that was consolidated beside its shards is read in place of them

    def recognises(self, source: Any) -> bool:
        return is_folder(source) and any(map(SHARD.fullmatch, names_in(source)))

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            return _open(source, files)


def _open(folder: Path, files: Files) -> FileCheckpoint:
    matches = [match for match in map(SHARD.fullmatch, names_in(folder)) if match]
    if len({match[3] for match in matches}) > 1:
        raise CheckpointError(
            f"{folder} holds shards of several checkpoints: their names state different numbers of files."
        )
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    unread: dict[str, str] = {}
    for match in matches:
        path = folder / match.string
        header = read_header(files.open(path))
        unread.update(header.unread)
        offsets = _offsets(path, header)
        for name, tensor in header.tensors.items():
            if name not in offsets:
                raise CheckpointError(f"{path} does not state the offsets of its chunk of tensor {shortened(name)}.")
            chunks[name].append(Chunk(_checked_offsets(path, name, offsets[name], len(tensor.shape)), tensor))
    missing = _missing_shards(matches)
    tensors = {name: _tensor(f"{folder}{missing}", name, chunks_of_one) for name, chunks_of_one in chunks.items()}
    description = f"transformers shards, {len(matches)} files{missing}"
    return FileCheckpoint(files, description, tensors, read_config(folder, files), unread=unread)


def _missing_shards(matches: list[re.Match[str]]) -> str:
    """Return which shards are missing, in words: they are numbered from 1, and a rank without tensors writes none."""
    present = {int(match[1]) for match in matches}
    missing = [str(shard) for shard in range(1, max(present)) if shard not in present]
    return f" (without shard {', '.join(missing[:5])})" if missing else ""


def _offsets(path: Path, header: Header) -> Mapping[str, Any]:
    text = header.metadata.get(SHARDING)
    if text is None:
        raise CheckpointError(f"{path} does not state the offsets of its chunks: its metadata has no {SHARDING}.")
    return parse_json(text.encode(), f"{SHARDING} of {path}", strict=True)


def _checked_offsets(path: Path, name: str, entry: Any, dims: int) -> tuple[int, ...]:
    offsets = entry.get(OFFSETS) if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != dims
        or not all(type(offset) is int and 0 <= offset < 1 << 48 for offset in offsets)
    ):
        raise CheckpointError(f"{path} gives tensor {shortened(name)} offsets that are not {dims} indices.")
    return tuple(offsets)


def _tensor(where: str, name: str, chunks: list[Chunk]) -> ChunkedTensor:
    try:
        return tensor_from_chunks(chunks)
    except CheckpointError as error:
        raise CheckpointError(f"Tensor {shortened(name)} in {where} {error}.") from error
