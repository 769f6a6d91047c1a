"""A stand-in for the API, so that the command line is tested without worlds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from tpcheck.report.report import Report

Verify = Callable[..., Report]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs the command line, with `verify_family` replaced where one is given."""

    def run(*arguments: str, verify_family: Verify | None = None) -> Any:
        from tpcheck.cli import app

        if verify_family is not None:
            stub = ModuleType("tpcheck.model.verify")
            stub.verify_family = verify_family  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "tpcheck.model.verify", stub)
            # Families, backends and values are invented; tests/cli/test_bad_usage.py has those that are refused.
            monkeypatch.setattr("tpcheck.families.build.type_and_head", lambda family: None)
            monkeypatch.setattr("tpcheck.lab.matrix.require_valid_options", lambda options: None)
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return run
