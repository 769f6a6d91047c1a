"""Phases of this process and of the first rank reach who listens, in order; nobody has to."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tpcheck import Rank, Topology, spawn
from tpcheck.core.phases import begin_phase, listening, phases_of_ranks


def test_phases_of_this_process_are_heard_while_somebody_listens() -> None:
    heard: list[str] = []
    begin_phase("before")
    with listening(heard.append):
        begin_phase("first")
        begin_phase("second")
        begin_phase("of another rank", 1)
    begin_phase("after")
    assert heard == ["first", "second"]


def of_a_rank(rank: Rank) -> None:
    if rank.rank == 0:
        begin_phase("drawing models")
        begin_phase("training: 2 steps")


def test_phases_of_the_first_rank_are_heard_in_the_process_that_spawned_it() -> None:
    heard: list[str] = []
    with (
        listening(heard.append),
        phases_of_ranks() as environment,
        spawn(Topology(tp=2), timeout=120, env=environment) as world,
    ):
        world.run(of_a_rank)
    assert heard == ["drawing models", "training: 2 steps"]


def test_ranks_report_nothing_where_nobody_listens() -> None:
    with phases_of_ranks() as environment:
        assert environment == {}


def test_a_process_that_is_killed_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with listening(print), phases_of_ranks() as environment:
        [path] = environment.values()
        assert Path(path).exists()
        if Path("/proc/self/fd").is_dir():
            assert not list(tmp_path.iterdir())
    assert not Path(path).exists()
