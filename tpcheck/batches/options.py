"""The options of `watch`, `check_batch`, `watch_model` and the callbacks: from the code, TPCHECK, or pyproject.toml."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.report.report import Report

OnMismatch = str | Callable[[Report], None]
_OFF, _ON = ("0", "off", "false", "no"), ("1", "on", "true", "yes", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """What the hooks compare, when, and what they do with a mismatch.

    An option that the code does not give, or gives as None, comes from the environment variable TPCHECK (`0` turns the
    hooks off; `warn` and `raise` are values of `on_mismatch`), then from `[tool.tpcheck]` of the nearest pyproject.toml
    at or above the working directory (all but `group` and `topology`), then from the defaults below.

    Attributes:
        group: A TP group: a torch ProcessGroup, or a DeviceMesh of one dim.
        topology: Sizes of the axes. Without `group` and `topology`, the groups of transformers, DeepSpeed, accelerate
            or Megatron are looked up at the first batch.
        every: Compare every so many batches.
        on_mismatch: What to do when the batches of a TP group differ or end at different times: `raise` on every rank,
            `warn` once for each field, or a callable that takes the report.
        across_dp: What to do when replicas train on the same samples: `raise`, `warn` or `ignore`.
        over_steps: What to do when a rank gets samples again, or leaves some out, within one epoch: `warn`, `raise` or
            `ignore`.
        overlap: Compare while the step runs, and report one step later.
        timeout: Seconds that ranks wait for each other at a batch. A rank that dies or raises is reported at once.

    Raises:
        UsageError: A value is not accepted.
    """

    group: Any = None
    topology: Topology | None = None
    every: int = 1
    on_mismatch: OnMismatch = "raise"
    across_dp: str = "warn"
    over_steps: str = "warn"
    overlap: bool = False
    # As long as a checkpoint that one rank saves between two batches may take. DeepSpeed waits 10 minutes, transformers
    # 2 hours.
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise UsageError("every", self.every, "a positive integer")
        if self.on_mismatch not in ("raise", "warn") and not callable(self.on_mismatch):
            raise UsageError("on_mismatch", self.on_mismatch, "raise, warn, or a callable that takes the report")
        if self.across_dp not in ("raise", "warn", "ignore"):
            raise UsageError("across_dp", self.across_dp, ("raise", "warn", "ignore"))
        if self.over_steps not in ("raise", "warn", "ignore"):
            raise UsageError("over_steps", self.over_steps, ("raise", "warn", "ignore"))
        if not isinstance(self.overlap, bool):
            raise UsageError("overlap", self.overlap, (True, False))
        if not isinstance(self.timeout, (int, float)) or isinstance(self.timeout, bool) or not self.timeout > 0:
            raise UsageError("timeout", self.timeout, "seconds above 0")

    @classmethod
    def resolve(cls, **given: Any) -> WatchOptions | None:
        """Return the options of a hook, or None where `TPCHECK=0` turns hooks off.

        Raises:
            UsageError: An option is unknown or has a value that is not accepted.
        """
        names = {field.name for field in fields(cls)}
        in_code = {name: value for name, value in given.items() if value is not None or name not in names}
        cls(**in_code)
        switch = os.environ.get("TPCHECK", "").lower()
        if switch in _OFF:
            return None
        if switch not in (*_ON, "warn", "raise"):
            raise UsageError("TPCHECK", switch, "0 (hooks are off), 1, warn, or raise")
        in_environment = {} if switch in _ON else {"on_mismatch": switch}
        return cls(**_of_project(Path.cwd()) | in_environment | in_code)


_FROM_PROJECT = tuple(field.name for field in fields(WatchOptions) if field.name not in ("group", "topology"))


class WatchArguments(TypedDict, total=False):
    """`WatchOptions` as the hooks' keyword arguments, for type checkers; None is an option that is not given."""

    group: Any
    topology: Topology | None
    every: int | None
    on_mismatch: OnMismatch | None
    across_dp: str | None
    over_steps: str | None
    overlap: bool | None
    timeout: float | None


Hook = TypeVar("Hook", bound=Callable[..., Any])


def takes_watch_options(hook: Hook) -> Hook:
    """Show the options, which the hook takes as `**options`, by name in `help` and `inspect.signature`."""
    signature = inspect.signature(hook)
    parameters = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    types = WatchArguments.__annotations__
    parameters += [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=types[field.name])
        for field in fields(WatchOptions)
    ]
    hook.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return hook


def _of_project(start: Path) -> dict[str, Any]:
    """Return the options in `[tool.tpcheck]` of the nearest pyproject.toml."""
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
        WatchOptions(**table)
    except UsageError as error:
        raise UsageError(f"[tool.tpcheck] of {file}: {error.name}", error.value, error.accepted) from error
    return dict(table)
