"""Tensor parallelism that is written by hand: right code of every style passes, mistakes are found alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpcheck import Topology
from tpcheck.lab.faults.hand_written import CONTROLS, FAULTS, HandWrittenControl, HandWrittenFault
from tpcheck.lab.faults.runs import run_hand_written_control, run_hand_written_fault
from tpcheck.world.world import World, spawn

REPLAYS = 2  # mistakes stand far above the noise of any number of replays
LEAST_MARGIN = 1e3


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[Topology, World]]:
    """Yield a world of each topology, which serves all rows: a row alone takes less time than its world."""
    opened: dict[Topology, World] = {}
    try:
        for topology in dict.fromkeys(row.topology for row in (*FAULTS, *CONTROLS)):
            opened[topology] = spawn(topology, timeout=120).__enter__()
        yield opened
    finally:
        for world in opened.values():
            world.__exit__(None, None, None)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_right_code_passes(control: HandWrittenControl, worlds: dict[Topology, World]) -> None:
    result = run_hand_written_control(control, world=worlds[control.topology])
    assert result.verdict == "passed", result.message
    assert result.margin < 0.5


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_mistake_is_found_alone(fault: HandWrittenFault, worlds: dict[Topology, World]) -> None:
    result = run_hand_written_fault(fault, replays=REPLAYS, world=worlds[fault.topology])
    assert result.caught, result.message
    assert result.place_is_right, (result.place, result.true_places, result.checks)
    assert result.cause_is_right, (result.cause, result.true_causes)
    assert result.margin > LEAST_MARGIN
