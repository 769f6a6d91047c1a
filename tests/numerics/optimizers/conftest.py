"""A world that serves the tests of a file: its ranks import the libraries once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpcheck import Topology, spawn
from tpcheck.world.world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with spawn(Topology(tp=2, dp=2), timeout=120) as world:
        yield world
