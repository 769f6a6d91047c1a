"""What a test and a session ask for: command line options, ini settings, and the marker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.world.preload import DEFAULT
from tpcheck.world.world import World, checked_seed, spawn

_MARKER = (
    "tpcheck(tp=, dp=, timeout=, device=, backend=, seed=): run the test's body on every rank of a world of this "
    "topology. At least one axis is named. timeout: seconds, None for no limit; device: cpu or cuda; backend: gloo or "
    "nccl; seed: the same on every rank, else each rank has its own."
)


@dataclass(frozen=True, slots=True)
class Options:
    """What holds where a marker does not say otherwise.

    Attributes:
        timeout: Seconds, None for no limit.
        device: `cpu`, `cuda` or None, as for `tpcheck.spawn`.
        backend: `gloo`, `nccl` or None, as for `tpcheck.spawn`.
        fresh: Every example of a `@given` test gets processes of its own.
        preload: Imported before ranks are forked, besides what tpcheck imports anyway.
        capture: Keep what ranks print, rather than let it through.
    """

    timeout: float | None
    device: str | None
    backend: str | None
    fresh: bool
    preload: tuple[str, ...]
    capture: bool


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tpcheck", "tpcheck: tests that run on several ranks")
    group.addoption(
        "--tpcheck-timeout",
        type=float,
        metavar="SECONDS",
        help="time that a marked test's body may take, 0 for no limit (default: 60); its marker goes first",
    )
    group.addoption("--tpcheck-device", choices=("cpu", "cuda"), help="where ranks compute; a marker goes first")
    group.addoption("--tpcheck-backend", choices=("gloo", "nccl"), help="how ranks communicate; a marker goes first")
    group.addoption(
        "--tpcheck-fresh",
        action="store_true",
        default=None,
        help="never reuse workers: every example of a @given test gets fresh processes, too",
    )
    parser.addini("tpcheck_timeout", "default of --tpcheck-timeout", default="60")
    parser.addini("tpcheck_device", "default of --tpcheck-device", default="")
    parser.addini("tpcheck_backend", "default of --tpcheck-backend", default="")
    parser.addini("tpcheck_fresh", "default of --tpcheck-fresh", type="bool", default=False)
    parser.addini(
        "tpcheck_preload",
        "slow modules of yours, imported once rather than by every rank; they must run no tensor operation meanwhile",
        type="args",
        default=[],
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    options_of(config)  # a bad setting is told before any test runs


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
        device=_choice(config, "tpcheck_device", ("cpu", "cuda")),
        backend=_choice(config, "tpcheck_backend", ("gloo", "nccl")),
        fresh=config.getini("tpcheck_fresh") if fresh is None else fresh,
        preload=tuple(config.getini("tpcheck_preload")),
        capture=config.getoption("capture") != "no",
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


@dataclass(frozen=True, slots=True)
class WorldRequest:
    """A world that can be opened any number of times; see `tpcheck.spawn` for what the attributes mean."""

    topology: Topology
    timeout: float | None
    device: str | None
    backend: str | None
    seed: int | None
    preload: tuple[str, ...] | None
    capture: bool

    def open(self, env: Mapping[str, str] | None = None) -> World:
        """Return a new world.

        Raises:
            UsageError: The request is wrong, or asks for GPUs that are not there.
        """
        return spawn(
            self.topology,
            timeout=self.timeout,
            device=self.device,
            backend=self.backend,
            preload=self.preload,
            seed=self.seed,
            capture=self.capture,
            env=env,
        )


def is_marked(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARKER) is not None


def marked_request(item: pytest.Item, options: Options) -> WorldRequest:
    """Return what the item's markers ask for; a marker closer to the test overrides those of its class and module.

    Raises:
        UsageError: A marker is wrong.
    """
    arguments: dict[str, Any] = {}
    for mark in reversed(list(item.iter_markers(MARKER))):
        if mark.args:
            raise UsageError("pytest.mark.tpcheck", mark.args, "named arguments, such as tp=2")
        arguments.update(mark.kwargs)
    return world_request(arguments, options)


def world_request(arguments: Mapping[str, Any], options: Options) -> WorldRequest:
    """Return the request that these arguments (axes and settings) amount to.

    Raises:
        UsageError: A name is not known, no axis is named, or a size is wrong.
    """
    for name, value in arguments.items():
        if name not in (*_AXES, *_SETTINGS):
            raise UsageError(name, value, (*_AXES, *_SETTINGS))
    axes = {name: arguments[name] for name in _AXES if name in arguments}
    if not axes:
        raise UsageError("tp", None, "the size of an axis: say how many ranks, as in tp=2")
    return WorldRequest(
        Topology(**axes),
        timeout=arguments.get("timeout", options.timeout),
        device=arguments.get("device", options.device),
        backend=arguments.get("backend", options.backend),
        seed=checked_seed(arguments.get("seed")),
        preload=preloaded(options),
        capture=options.capture,
    )


def preloaded(options: Options) -> tuple[str, ...] | None:
    """Return what to import before forking; None, tpcheck's own choice, shares its template with every other world."""
    return (*DEFAULT, *options.preload) if options.preload else None
