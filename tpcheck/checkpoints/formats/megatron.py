"""Megatron's distributed checkpoints (`--ckpt-format torch_dist`), in the format of torch.distributed.checkpoint.

Megatron saves the optimizer beside the model under flat names, and the layers of a stack as one tensor.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.dcp import METADATA, read_chunks, read_metadata
from tpcheck.checkpoints.formats.file_checkpoint import FileCheckpoint
from tpcheck.checkpoints.formats.files import Files, inside, is_folder, is_present, read_config, read_json, shortened
from tpcheck.core.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
BACKENDS = "metadata.json"
READABLE = ("torch_dist", "torch_dcp", "fsdp_dtensor")
NOT_MODEL = re.compile(r"(chained_\d+\.)?(optimizer|optim|opt_param_scheduler|lr_scheduler|rng_state|rerun_state).*")
SHARD_OF_AN_OBJECT = re.compile(r"/shard_[\d_.]+")


class MegatronFormat:
    """Opens the folder of an iteration, or the folder above it, whose tracker file names the iteration."""

    name = "megatron"
    precedence = 37  # above dcp, which recognises it, too

    def recognises(self, source: Any) -> bool:
        if not is_folder(source):
            return False
        return is_present(source / TRACKER) or (is_present(source / BACKENDS) and is_present(source / METADATA))

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            return _open(_iteration(source, files), files, options)


def _iteration(root: Path, files: Files) -> Path:
    """Return the folder of the iteration that the tracker file names, or the root where there is no tracker file."""
    if not is_present(root / TRACKER):
        return root
    file = files.open(root / TRACKER)
    text = bytes(file.read(0, min(file.size, 100))).decode("utf-8", "replace").strip()
    if not re.fullmatch(r"\d{1,18}|release", text, re.ASCII):
        raise CheckpointError(f"{root / TRACKER} holds {shortened(text)}, which is not an iteration.")
    folder = root / "release" if text == "release" else root / f"iter_{int(text):07d}"
    if not is_folder(folder):
        raise CheckpointError(f"{root / TRACKER} names iteration {text}, but there is no folder {folder.name}.")
    inside(root, f"{folder.name}/{METADATA}")
    return folder


def _open(folder: Path, files: Files, options: ReadOptions) -> FileCheckpoint:
    if not is_present(folder / BACKENDS):
        raise CheckpointError(f"{folder} is not a distributed checkpoint of Megatron: it has no {BACKENDS}.")
    backend = read_json(folder / BACKENDS, files).get("sharded_backend")
    if backend not in READABLE:
        raise CheckpointError(
            f"{folder} was saved by backend {shortened(backend)}; readable are {', '.join(READABLE)}."
        )
    metadata = read_metadata(folder, files, options)
    tensors = {
        name: read_chunks(folder, name, tensor, files)
        for name, tensor in metadata.tensors.items()
        if not NOT_MODEL.fullmatch(name)
    }
    unread = {
        SHARD_OF_AN_OBJECT.sub("", name): reason
        for name, reason in metadata.others.items()
        if not NOT_MODEL.fullmatch(name)
    }
    without = ", without the optimizer and other states" if len(tensors) < len(metadata.tensors) else ""
    return FileCheckpoint(
        files, f"Megatron {backend}, {folder.name}{without}", tensors, read_config(folder, files), unread=unread
    )
