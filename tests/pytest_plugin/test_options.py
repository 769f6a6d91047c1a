"""The arguments of a marker and the options of the session become those of a world."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from tpcheck import Topology, UsageError
from tpcheck.pytest_plugin.options import Options, preload_of, world_factory
from tpcheck.world.forkserver_client import DEFAULT_PRELOAD
from tpcheck.world.world import THIS_MACHINE, open_world

OPTIONS = Options(timeout=60.0, device="cpu", backend=None, fresh=False, preload=(), capture=True, launcher="auto")


def test_the_marker_overrides_the_options() -> None:
    factory = world_factory({"tp": 2, "timeout": None, "seed": 3}, OPTIONS)
    assert isinstance(factory, partial)
    assert factory.func is open_world
    assert factory.args == (THIS_MACHINE, Topology(tp=2))
    assert factory.keywords == {
        "timeout": None, "device": "cpu", "backend": None, "capture": True, "seed": 3, "preload": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tp": 2, "zp": 2}, "zp=2: expected one of"), ({"timeout": 5}, "tp=None: expected the size of an axis")],
)
def test_an_unknown_argument_and_a_missing_axis_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        world_factory(arguments, OPTIONS)


def test_modules_to_preload_are_imported_after_the_defaults() -> None:
    options = replace(OPTIONS, preload=("json",))
    assert preload_of(options) == (*DEFAULT_PRELOAD, "json")
    assert preload_of(OPTIONS) is None
