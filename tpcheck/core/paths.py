"""Paths that users give."""

from __future__ import annotations

import os
from pathlib import Path

from tpcheck.core.errors import UsageError


def existing_path(argument: str, source: str | os.PathLike[str]) -> Path:
    """Return the path after a check that it can be read.

    Args:
        argument: The caller's argument, for the message.

    Raises:
        UsageError: There is nothing at the path, or it cannot be read.
    """
    path = Path(source)
    try:
        path.stat()
    except FileNotFoundError:
        raise UsageError(argument, str(source), "a file or folder that exists") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(argument, str(source), f"a file or folder that can be read ({reason})") from error
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise UsageError(argument, str(source), "a folder that can be read (permission denied)")
    return path
