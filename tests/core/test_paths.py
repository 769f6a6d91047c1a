"""Paths that users give."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpcheck.core.errors import UsageError
from tpcheck.core.paths import existing_path


def test_a_folder_that_this_user_cannot_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert existing_path("actual", tmp_path) == tmp_path
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read all
    with pytest.raises(UsageError, match="a folder that can be read"):
        existing_path("actual", tmp_path)


def test_a_path_that_no_system_has_is_refused() -> None:
    with pytest.raises(UsageError, match="can be read"):
        existing_path("actual", "\0")
