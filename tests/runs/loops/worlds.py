"""Runs loops on real ranks, records them, and compares the traces; worlds and expected traces serve many loops."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tpcheck
from tests.runs.loops.loop import Loop, Side, Weights, disagreement, train
from tpcheck import Report, Topology, World
from tpcheck.world.forkserver_client import ZERO_PRELOAD


@dataclass(frozen=True, slots=True)
class Compared:
    """What came of a loop.

    Attributes:
        report: Of its trace against the expected one.
        difference: Of the weights at the end, without tpcheck.
    """

    report: Report
    difference: float


_RUNS_OF_A_WORLD = 5
"""Loops leave their groups behind, each with threads of gloo that wake up a hundred times a second: 150 groups take a
seventh of a core for each rank that waits."""


@dataclass
class LoopRunner:
    """Keeps a world for each topology, for some loops, and the trace of each expected side."""

    folder: Path
    stack: ExitStack
    worlds: dict[Topology, World] = field(default_factory=dict)
    num_runs: Counter[Topology] = field(default_factory=Counter)
    expected: dict[Side, tuple[Path, Sequence[Weights]]] = field(default_factory=dict)

    def compare(self, loop: Loop) -> Compared:
        if loop.expected not in self.expected:
            path = self.folder / f"expected-{len(self.expected)}.trace"
            self.expected[loop.expected] = path, self.run(loop.expected, path)
        expected_path, expected_weights = self.expected[loop.expected]
        actual_path = self.folder / "actual.trace"
        actual_weights = self.run(loop.actual, actual_path)
        difference = 0.0 if loop.names else disagreement(actual_weights, expected_weights, loop)
        return Compared(tpcheck.compare_traces(actual_path, expected_path, names=loop.names), difference)

    def run(self, side: Side, path: Path | None) -> Sequence[Weights]:
        topology = side.topology
        if self.num_runs[topology] % _RUNS_OF_A_WORLD == 0:
            if topology in self.worlds:
                self.worlds[topology].close()
            self.worlds[topology] = self.stack.enter_context(tpcheck.spawn(topology, timeout=120, also=ZERO_PRELOAD))
        self.num_runs[topology] += 1
        weights: Sequence[Weights] = self.worlds[topology].run(train, side, path)
        return weights


@contextmanager
def loop_runner(folder: Path) -> Iterator[LoopRunner]:
    with ExitStack() as stack:
        yield LoopRunner(folder, stack)


def as_parameters(loops: Sequence[Loop], seldom: Collection[str]) -> list[Any]:
    """Return the parameter of a test for each loop, named after it; it must fail where the row says so.

    Unless TPCHECK_LOOPS is `all`, as in ci/loops, every third of the rows that are not seldom is run: all take longer
    than the rest of the tests.

    Args:
        seldom: Names of the rows that are left out in any case.
    """
    names = [loop.name for loop in loops]
    assert len(set(names)) == len(names), "two loops of one name"
    usual = [loop for loop in loops if loop.name not in seldom][::3]
    return [
        pytest.param(
            loop,
            id=loop.name,
            marks=[pytest.mark.xfail(reason=loop.xfail, strict=True)] if loop.xfail is not None else [],
        )
        for loop in (loops if os.environ.get("TPCHECK_LOOPS") == "all" else usual)
    ]
