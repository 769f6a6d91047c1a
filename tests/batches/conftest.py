"""Worlds that all tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpcheck import Topology, World, spawn


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with spawn(Topology(tp=2), timeout=60) as world:
        yield world


@pytest.fixture(scope="module")
def square() -> Iterator[World]:
    with spawn(Topology(tp=2, dp=2), timeout=60) as world:
        yield world


@pytest.fixture(scope="module")
def four() -> Iterator[World]:
    with spawn(Topology(tp=4), timeout=60) as world:
        yield world
