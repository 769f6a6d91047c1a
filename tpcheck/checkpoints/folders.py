"""What a path that may be a checkpoint looks like from outside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def as_path(source: Any) -> Path | None:
    """Return the source as a path, if it is one and not a live object."""
    return Path(source) if isinstance(source, (str, os.PathLike)) else None


def is_folder(path: Path) -> bool:
    """Return whether this is a folder; not where that cannot be told."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_present(path: Path) -> bool:
    """Return whether there is anything of that name: a link that leads nowhere is, and opening it says so."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none where it cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
