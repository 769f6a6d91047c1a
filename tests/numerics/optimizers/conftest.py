"""A world that serves the tests of a file; the forkserver imports what the file names in IMPORTED."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpcheck import Topology, spawn
from tpcheck.world.world import World


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with spawn(Topology(tp=2, dp=2), timeout=120, also=request.module.IMPORTED) as world:
        yield world
