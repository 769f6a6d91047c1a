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


def test_the_file_of_phases_has_no_name_that_a_killed_process_could_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with listening(print), phases_of_ranks() as environment:
        [place] = environment.values()
        path = Path(place.rpartition(":")[0])
        assert path.exists()
        if Path("/proc/self/fd").is_dir():
            assert not list(tmp_path.iterdir())
    assert not path.exists()


def test_a_late_rank_writes_to_no_file_that_has_taken_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(print), phases_of_ranks() as environment:
        [(name, place)] = environment.items()
    other = tmp_path / "other"
    other.touch()
    monkeypatch.setenv(name, f"{other}:{place.rpartition(':')[2]}")
    begin_phase("training")
    assert other.read_text() == ""
