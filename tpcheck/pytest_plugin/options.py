"""The command line options, the ini settings, and the marker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import pytest

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.world.forkserver_client import DEFAULT_PRELOAD
from tpcheck.world.groups import BACKENDS
from tpcheck.world.world import DEVICES, THIS_MACHINE, Machines, World, open_world

_MARKER = (
    "tpcheck(tp=, dp=, timeout=, device=, backend=, seed=): run the test's body on every rank of a world of this "
    "topology. Name at least one axis. timeout: seconds, None for no limit; device: cpu or cuda; backend: gloo or "
    "nccl; seed: the same on every rank (default: a different one on each)."
)

LAUNCHER_USES = ("auto", "spawn")


@dataclass(frozen=True, slots=True)
class Options:
    """What applies where the marker of a test sets nothing else.

    Attributes:
        timeout: Seconds, None for no limit.
        device: `cpu`, `cuda` or None, as for `tpcheck.spawn`.
        backend: `gloo`, `nccl` or None, as for `tpcheck.spawn`.
        fresh: Every example of a `@given` test runs in new processes.
        preload: Modules imported before ranks are forked, beside the defaults.
        capture: Capture what ranks print.
        launcher: `auto` or `spawn`.
    """

    timeout: float | None
    device: str | None
    backend: str | None
    fresh: bool
    preload: tuple[str, ...]
    capture: bool
    launcher: str


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tpcheck", "tpcheck: tests that run on several ranks")
    group.addoption(
        "--tpcheck-timeout",
        type=float,
        metavar="SECONDS",
        help="limit for the body of a marked test, 0 for none (default: 60); the marker overrides it",
    )
    group.addoption("--tpcheck-device", choices=DEVICES, help="device of the ranks; the marker overrides it")
    group.addoption("--tpcheck-backend", choices=BACKENDS, help="backend of process groups; the marker overrides it")
    group.addoption(
        "--tpcheck-fresh",
        action="store_true",
        default=None,
        help="run every example of a @given test in new processes",
    )
    group.addoption(
        "--tpcheck-launcher",
        choices=LAUNCHER_USES,
        help="under torchrun or srun: auto (default) runs marked tests on the launcher's ranks, spawn starts worlds of "
        "its own on each",
    )
    parser.addini("tpcheck_launcher", "default of --tpcheck-launcher", default="auto")
    parser.addini("tpcheck_timeout", "default of --tpcheck-timeout", default="60")
    parser.addini("tpcheck_device", "default of --tpcheck-device", default="")
    parser.addini("tpcheck_backend", "default of --tpcheck-backend", default="")
    parser.addini("tpcheck_fresh", "default of --tpcheck-fresh", type="bool", default=False)
    parser.addini(
        "tpcheck_preload",
        "modules to import once, before ranks are forked; they must not run tensor operations when imported",
        type="args",
        default=[],
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    options_of(config)  # raises for a wrong setting before any test runs


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.get_verbosity() < 1:
        return None
    options = options_of(config)
    limit = "no timeout" if options.timeout is None else f"timeout {options.timeout:g} s"
    return f"tpcheck: {limit}, device {options.device or 'auto'}, backend {options.backend or 'auto'}"


def options_of(config: pytest.Config) -> Options:
    """Return the options of this session.

    Raises:
        pytest.UsageError: A setting is wrong.
    """
    timeout = _timeout(config)
    fresh = config.getoption("tpcheck_fresh")
    return Options(
        timeout=timeout or None,
        device=_choice(config, "tpcheck_device", DEVICES),
        backend=_choice(config, "tpcheck_backend", BACKENDS),
        fresh=config.getini("tpcheck_fresh") if fresh is None else fresh,
        preload=tuple(config.getini("tpcheck_preload")),
        capture=config.getoption("capture") != "no",
        launcher=_choice(config, "tpcheck_launcher", LAUNCHER_USES) or "auto",
    )


def _timeout(config: pytest.Config) -> float:
    text = config.getoption("tpcheck_timeout")
    text = config.getini("tpcheck_timeout") if text is None else text
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise pytest.UsageError(f"tpcheck_timeout={text!r}: expected seconds, or 0 for no limit")
    return seconds


def _choice(config: pytest.Config, name: str, accepted: tuple[str, ...]) -> str | None:
    value: str | None = config.getoption(name) or config.getini(name) or None
    if value is not None and value not in accepted:
        raise pytest.UsageError(f"{name}={value!r}: expected one of {', '.join(accepted)}")
    return value


MARKER = "tpcheck"
_AXES = tuple(field.name for field in fields(Topology))
_SETTINGS = ("timeout", "device", "backend", "seed")


def is_marked(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARKER) is not None


def marked_world(item: pytest.Item, options: Options, machines: Machines) -> Callable[..., World]:
    """Return what opens a world with the arguments of the markers; a closer one overrides those of class and module.

    Raises:
        UsageError: A marker is wrong.
    """
    arguments: dict[str, Any] = {}
    for mark in reversed(list(item.iter_markers(MARKER))):
        if mark.args:
            raise UsageError("pytest.mark.tpcheck", mark.args, "named arguments, such as tp=2")
        arguments.update(mark.kwargs)
    return world_factory(arguments, options, machines)


def world_factory(
    arguments: Mapping[str, Any], options: Options, machines: Machines = THIS_MACHINE
) -> Callable[..., World]:
    """Return what opens a world with these arguments of a marker, and the options for those that it does not set.

    Raises:
        UsageError: A name is unknown, no axis is named, or a size is wrong.
    """
    for name, value in arguments.items():
        if name not in (*_AXES, *_SETTINGS):
            raise UsageError(name, value, (*_AXES, *_SETTINGS))
    axes = {name: arguments[name] for name in _AXES if name in arguments}
    if not axes:
        raise UsageError("tp", None, "the size of an axis, such as tp=2")
    defaults = {name: getattr(options, name) for name in ("timeout", "device", "backend", "capture")}
    settings = {name: arguments[name] for name in _SETTINGS if name in arguments}
    return partial(open_world, machines, Topology(**axes), preload=preload_of(options), **{**defaults, **settings})


def preload_of(options: Options) -> tuple[str, ...] | None:
    """Return the modules to import before forking, None for the defaults: all worlds then share a forkserver."""
    return (*DEFAULT_PRELOAD, *options.preload) if options.preload else None
