"""A rank's environment is complete on machines where the user has no home, no cache, or a long path."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from tpcheck import Topology
from tpcheck.world.environment import rank_environ

TOO_LONG = "/" + 300 * "x"  # no system looks into it, not even for root


def extensions_dir(scratch: Path) -> str:
    environ = rank_environ({}, topology=Topology(tp=2), rank=0, port=1, device="cpu", scratch=str(scratch), extra={})
    return environ["TORCH_EXTENSIONS_DIR"]


def test_extensions_are_built_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert extensions_dir(tmp_path / "world") == str(tmp_path / ".cache" / "tpcheck" / "torch_extensions")


@pytest.mark.parametrize("home", [None, TOO_LONG, "/proc"])
def test_extensions_are_built_in_the_worlds_folder_where_there_is_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tpcheck.world.environment.os.access", lambda path, mode: str(path) != "/proc")
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", _unknown)
    else:
        monkeypatch.setenv("HOME", home)
    assert extensions_dir(tmp_path) == str(tmp_path / "tpcheck" / "torch_extensions")


def _unknown(uid: int) -> None:
    raise KeyError(uid)
