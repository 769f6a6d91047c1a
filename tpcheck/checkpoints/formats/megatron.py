"""Megatron's distributed checkpoints (`--ckpt-format torch_dist`), in the format of torch.distributed.checkpoint.

Megatron saves the optimizer beside the model under flat names, and the layers of a stack as one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions, TrainingStates
from tpcheck.checkpoints.formats.dcp import METADATA, Metadata, read_chunks, read_metadata, read_other_entries
from tpcheck.checkpoints.formats.file_checkpoint import ChunkedTensor, FileCheckpoint
from tpcheck.checkpoints.formats.files import Files, inside, is_folder, is_present, read_config, read_json, shortened
from tpcheck.checkpoints.formats.torch_files import load
from tpcheck.checkpoints.formats.training_states import CLASSES
from tpcheck.core.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
BACKENDS = "metadata.json"
READABLE = ("torch_dist", "torch_dcp", "fsdp_dtensor")
NOT_MODEL = re.compile(r"(chained_\d+\.)?(optimizer|optim|opt_param_scheduler|lr_scheduler|rng_state|rerun_state).*")
STATE = re.compile(r"(?P<chain>chained_\d+\.)?optimizer\.state\.(?P<kind>\w+)\.(?P<parameter>.+)")
COMMON = "common.pt"
STATES = ("iteration", "opt_param_scheduler", "optimizer", "num_floating_point_operations_so_far")
"""Entries of the file that all ranks share; the others are options and versions."""
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
        files,
        f"Megatron {backend}, {folder.name}{without}",
        tensors,
        read_config(folder, files),
        unread=unread,
        read_states=lambda: _training_states(folder, metadata, files, options, tensors),
    )


def _training_states(
    folder: Path, metadata: Metadata, files: Files, options: ReadOptions, model: Mapping[str, ChunkedTensor]
) -> TrainingStates | None:
    """Return the entries beside the model, and what every rank has in common, in a file of its own."""
    common = load(folder / COMMON, files, options, keep=CLASSES) if is_present(folder / COMMON) else {}
    entries = {key: value for key, value in common.items() if key in STATES} if isinstance(common, Mapping) else {}
    optimizer = entries.pop("optimizer", None)
    groups = _param_groups(optimizer)
    keys = {name: _keys(name) for name in (*metadata.tensors, *metadata.objects) if NOT_MODEL.fullmatch(name)}
    shapes = {name: tensor.shape for name, tensor in model.items()}
    if groups is not None and not any(path[0] == "optimizer" for path in keys.values()):
        entries["optimizer"] = {"state": {}, "param_groups": groups}
    elif groups is not None:
        entries["optimizer groups"] = groups
    return read_other_entries(folder, metadata, keys, files, shapes, entries)


def _param_groups(optimizer: Any) -> Any:
    inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, Mapping) else None
    return inner.get("param_groups") if isinstance(inner, Mapping) else None


def _keys(name: str) -> tuple[str, ...]:
    """Return the keys of torch's state dicts for a flat name: Megatron puts the kind before the parameter."""
    matched = STATE.fullmatch(name)
    if matched is None:
        return (name,)
    return f"{matched['chain'] or ''}optimizer", "state", matched["parameter"], matched["kind"]
