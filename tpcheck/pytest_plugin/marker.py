"""What world a test asks for, from its markers and the session's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest

from tpcheck.errors import UsageError
from tpcheck.pytest_plugin.options import Options
from tpcheck.topology import Topology
from tpcheck.world import World, spawn
from tpcheck.world.arguments import checked_seed
from tpcheck.world.preload import DEFAULT

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
