"""Finds the format of a checkpoint, and opens it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tpcheck.adapters import Checkpoint, ReadOptions, checkpoint_formats
from tpcheck.errors import CheckpointError, UsageError


def opened(name: str, source: Any, options: ReadOptions) -> Checkpoint:
    """Return the checkpoint at a path, or in a live object, opened by the format that recognises it.

    Args:
        name: What the caller calls it, for messages: `actual` or `reference`.

    Raises:
        UsageError: There is nothing at that path, or no format knows what is there.
        CheckpointError: The files are damaged, hostile or incomplete.
    """
    found = _path(name, source) if isinstance(source, (str, os.PathLike)) else source
    formats = checkpoint_formats()
    for one in formats:
        if one.recognises(found):
            return one.open(found, options)
    if not isinstance(found, Path):
        raise UsageError(name, type(source).__name__, "a path, a torch.nn.Module or a dict of tensors")
    if found.is_dir() and not any(found.iterdir()):
        raise CheckpointError(f"{found} is an empty folder")
    holds = f"; it holds {_few(found)}" if found.is_dir() else ""
    raise UsageError(name, str(source), f"a checkpoint ({', '.join(one.name for one in formats)}){holds}")


def _path(name: str, source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    try:
        path.stat()
    except FileNotFoundError:
        raise UsageError(name, str(source), "a file or folder that exists") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(name, str(source), f"a file or folder that can be read ({reason})") from error
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise UsageError(name, str(source), "a folder that can be read (permission denied)")
    return path


def _few(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
