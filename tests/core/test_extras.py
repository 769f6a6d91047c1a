"""The libraries that tpcheck does not require."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tpcheck.core.extras import install_command, is_missing, missing_package


def test_what_is_imported_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))  # a stub has no spec
    assert not is_missing("pytorch_lightning")


def test_only_a_package_of_an_extra_is_told_how_to_install() -> None:
    assert install_command("tensorflow.keras") is None
    assert missing_package(ModuleNotFoundError("no", name="tensorflow")) is None
    assert missing_package(ImportError("half imported", name="deepspeed")) is None
