"""What a user asked for: in the code, then in TPCHECK, then in the project's pyproject.toml."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.report.report import Report

# As long as a checkpoint that one rank alone saves between two batches may take. A rank that dies or raises is heard of
# at once, whatever this says; DeepSpeed waits 10 minutes, transformers 2 hours.
TIMEOUT = 300.0
OnMismatch = str | Callable[[Report], None]
_OFF, _ON = ("0", "off", "false", "no"), ("1", "on", "true", "yes", "")
_FROM_PROJECT = ("every", "on_mismatch", "across_dp", "overlap", "timeout")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user asked for; see `tpcheck.watch`."""

    group: Any = None
    topology: Topology | None = None
    every: int = 1
    on_mismatch: OnMismatch = "raise"
    across_dp: str = "warn"
    overlap: bool = False
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise UsageError("every", self.every, "a positive integer")
        if self.on_mismatch not in ("raise", "warn") and not callable(self.on_mismatch):
            raise UsageError("on_mismatch", self.on_mismatch, "raise, warn, or a callable that takes the report")
        if self.across_dp not in ("raise", "warn", "ignore"):
            raise UsageError("across_dp", self.across_dp, ("raise", "warn", "ignore"))
        if not isinstance(self.overlap, bool):
            raise UsageError("overlap", self.overlap, (True, False))
        if not isinstance(self.timeout, (int, float)) or isinstance(self.timeout, bool) or not self.timeout > 0:
            raise UsageError("timeout", self.timeout, "seconds above 0")


def chosen_settings(**given: Any) -> Settings | None:
    """Return the settings of a hook, or None where `TPCHECK=0` turns hooks off.

    What the code gives (anything but None) goes before `TPCHECK=warn` or `TPCHECK=raise`, that before `[tool.tpcheck]`
    of the nearest pyproject.toml (`every`, `on_mismatch`, `across_dp`, `overlap`, `timeout`).

    Raises:
        UsageError: A setting is unknown or has a value that is not accepted.
    """
    in_code = {name: value for name, value in given.items() if value is not None}
    Settings(**in_code)
    switch = os.environ.get("TPCHECK", "").lower()
    if switch in _OFF:
        return None
    if switch not in (*_ON, "warn", "raise"):
        raise UsageError("TPCHECK", switch, "0 (hooks are off), 1, warn, or raise")
    in_environment = {} if switch in _ON else {"on_mismatch": switch}
    return Settings(**_of_project(Path.cwd()) | in_environment | in_code)


def _of_project(start: Path) -> dict[str, Any]:
    file = next((path for each in (start, *start.parents) if (path := each / "pyproject.toml").is_file()), None)
    if file is None:
        return {}
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        table = toml.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("tpcheck", {})
    except ValueError as error:
        raise UsageError("pyproject.toml", str(file), f"a TOML file ({error})") from error
    if not isinstance(table, Mapping) or not set(table) <= set(_FROM_PROJECT):
        raise UsageError(f"[tool.tpcheck] of {file}", table, _FROM_PROJECT)
    try:
        Settings(**table)
    except UsageError as error:
        raise UsageError(f"[tool.tpcheck] of {file}: {error.name}", error.value, error.accepted) from error
    return dict(table)
