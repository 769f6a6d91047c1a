"""What the environment and the project's pyproject.toml say of the hooks, where the code leaves it open."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from tpcheck.errors import UsageError
from tpcheck.watching import Settings

_OFF, _ON = ("0", "off", "false", "no"), ("1", "on", "true", "yes", "")
_FROM_PROJECT = ("every", "on_mismatch", "across_dp", "overlap", "timeout")


def chosen_settings(**given: Any) -> Settings | None:
    """Return the settings of a hook, or None where `TPCHECK=0` turns hooks off.

    What the code gives (anything but None) goes before `TPCHECK=warn` or `TPCHECK=raise`, that before `[tool.tpcheck]`
    of the nearest pyproject.toml (`every`, `on_mismatch`, `across_dp`, `overlap`, `timeout`).

    Raises:
        UsageError: A setting is unknown or has a value that is not accepted.
    """
    switch = os.environ.get("TPCHECK", "").lower()
    if switch in _OFF:
        return None
    if switch not in (*_ON, "warn", "raise"):
        raise UsageError("TPCHECK", switch, "0 (hooks are off), 1, warn, or raise")
    chosen = _of_project(Path.cwd())
    if switch not in _ON:
        chosen["on_mismatch"] = switch
    known = {field.name for field in fields(Settings)}
    return Settings(**chosen | {name: value for name, value in given.items() if value is not None and name in known})


def _of_project(start: Path) -> dict[str, Any]:
    file = next((path for each in (start, *start.parents) if (path := each / "pyproject.toml").is_file()), None)
    if file is None or sys.version_info < (3, 11):  # no tomllib
        return {}
    try:
        table = import_module("tomllib").loads(file.read_text()).get("tool", {}).get("tpcheck", {})
    except ValueError as error:
        raise UsageError("pyproject.toml", str(file), f"a TOML file ({error})") from error
    if not isinstance(table, Mapping) or not set(table) <= set(_FROM_PROJECT):
        raise UsageError("[tool.tpcheck]", table, _FROM_PROJECT)
    return dict(table)
