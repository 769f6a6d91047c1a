"""Checkpoints of torch.distributed.checkpoint: a `.metadata` file beside `*.distcp` files that hold chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.adapters import ReadOptions
from tpcheck.checkpoints.boxes import BoxedTensor
from tpcheck.checkpoints.dcp_chunks import put_chunks_together
from tpcheck.checkpoints.dcp_metadata import METADATA, Saved, read_metadata
from tpcheck.checkpoints.files import Files
from tpcheck.checkpoints.folders import as_path, is_folder, is_present
from tpcheck.checkpoints.state_dicts import KEYS
from tpcheck.checkpoints.strict_json import read_config
from tpcheck.checkpoints.table import TableCheckpoint
from tpcheck.errors import CheckpointError

NOT_THE_MODEL = ("optim", "lr_scheduler", "scheduler", "dataloader", "train_state", "rng", "ema")
"""Starts of the keys under which trainers save what is not the model."""

Keys = tuple[str, ...]


class DcpFormat:
    """Opens what `dcp.save` wrote; of a nested state dict, the model."""

    name = "dcp"
    precedence = 35  # above pytorch, which takes any file of torch.save that lies in a folder alone

    def recognises(self, source: Any) -> bool:
        path = as_path(source)
        return path is not None and is_folder(path) and is_present(path / METADATA)

    def open(self, source: Any, options: ReadOptions) -> TableCheckpoint:
        files = Files()
        try:
            return _opened(Path(source), files, options)
        except BaseException:
            files.close()
            raise


def _opened(folder: Path, files: Files, options: ReadOptions) -> TableCheckpoint:
    saved = read_metadata(folder, files, options)
    model = model_names(folder, saved)
    tensors: dict[str, BoxedTensor] = {
        new: put_chunks_together(folder, old, saved.tensors[old], files)
        for old, new in model.names.items()
        if old in saved.tensors
    }
    unread = {new: saved.others[old] for old, new in model.names.items() if old in saved.others}
    num_files = len({chunk.path for old in model.names if old in saved.tensors for chunk in saved.tensors[old].chunks})
    description = f"torch.distributed.checkpoint, {num_files} files{model.description}"
    return TableCheckpoint(files, description, tensors, read_config(folder, files), unread=unread)


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The part of a saved state dict that is the model.

    Attributes:
        names: Names in the model by names in the checkpoint.
        description: Which part that is, where it is not everything.
    """

    names: Mapping[str, str]
    description: str


def model_names(folder: Path, saved: Saved) -> ModelNames:
    """Find the model in a state dict that may hold an optimizer, too.

    Raises:
        CheckpointError: There are several that could be the model.
    """
    keys = {name: saved.keys.get(name, (name,)) for name in (*saved.tensors, *saved.others)}
    prefix = _prefix(folder, {keys[name] for name in saved.tensors})
    if prefix is None:  # the model's own names, perhaps with an optimizer beside them
        names = {name: name for name, path in keys.items() if len(path) == 1 and not _is_other(path[0])}
        left_out = sorted({path[0] for name, path in keys.items() if name not in names})
        without = f", without {', '.join(map(repr, left_out[:5]))}" if left_out else ""
        return ModelNames(names, without if any(name in saved.tensors for name in names) else "")
    names = {
        name: ".".join(path[len(prefix) :])
        for name, path in keys.items()
        if path[: len(prefix)] == prefix and len(path) > len(prefix)
    }
    return ModelNames(names, f", under {'.'.join(prefix)!r}" if prefix else "")


def _prefix(folder: Path, paths: set[Keys]) -> Keys | None:
    """Return the keys that lead to the model; None where its names lie at the top."""
    by_name = {path[: i + 1] for path in paths for i, key in enumerate(path[:-1]) if key in KEYS}
    depth = min(map(len, by_name), default=0)
    nearest = sorted(prefix for prefix in by_name if len(prefix) == depth and not any(map(_is_other, prefix)))
    if not nearest and not any(len(path) == 1 for path in paths):
        nearest = sorted({path[:1] for path in paths if not _is_other(path[0])})
    if len(nearest) > 1:
        keys = ", ".join(repr(".".join(prefix)) for prefix in nearest[:5])
        raise CheckpointError(f"{folder} holds several state dicts, under {keys}.")
    return nearest[0] if nearest else None


def _is_other(key: str) -> bool:
    return key.startswith(NOT_THE_MODEL)
