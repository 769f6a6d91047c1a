"""The summary that CI servers show beside a job: a file that every step adds to."""

from __future__ import annotations

import os
from pathlib import Path

from tpcheck.errors import TpcheckError


def summary_path(asked_for: Path | None) -> Path | None:
    """Return where a summary goes: where the user says, else where GitHub does, else nowhere."""
    of_github = os.environ.get("GITHUB_STEP_SUMMARY")
    return asked_for or (Path(of_github) if of_github else None)


def add_to(path: Path, text: str) -> None:
    """Add text to the end of a file.

    Raises:
        TpcheckError: It could not be written.
    """
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise TpcheckError(f"{path} cannot be written: {error.strerror or error}") from error
