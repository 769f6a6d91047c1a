"""`ci/soak` sees what it is there to see: what a round leaves, what grows, and a verdict that is wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tpcheck import RankFailure, RankOutcome, Topology

SCRIPT = Path(__file__).parents[1] / "ci" / "soak"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    loader = SourceFileLoader("soak", str(SCRIPT))
    spec = spec_from_loader("soak", loader)
    assert spec is not None
    module = sys.modules["soak"] = module_from_spec(spec)
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
        yield module
    finally:
        sys.dont_write_bytecode = written
        del sys.modules["soak"]


@pytest.fixture
def soak(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(script, "LEFT_LIMIT_S", 0.2)
    folder = tmp_path / "tmp"
    folder.mkdir()
    return script.Soak("1", folder, tmp_path, owns_disks=False)


def play(script: ModuleType, soak: Any, act: Callable[[Any], None]) -> list[str]:
    """Play a round that does this; return what was wrong."""
    before, script.KINDS["extra"] = soak.wrong.copy(), (act, "none")
    try:
        soak.play(len(soak.history), "extra", "none")
    finally:
        del script.KINDS["extra"]
    return [problem for *_, problem in soak.wrong[len(before) :]]


def test_what_does_not_grow_passes_whatever_its_noise(script: ModuleType) -> None:
    assert script.has_grown([7.0] * 50, more_than=0) == (False, 0.0)
    drawn = random.Random(0)
    wrong = sum(script.has_grown([drawn.gauss(600, 30) for _ in range(30)], more_than=0)[0] for _ in range(400))
    assert wrong <= 3  # 0.4 expected at p < 0.001


@pytest.mark.parametrize("every", [1, 3, 10])
def test_what_grows_is_found_between_noise(script: ModuleType, every: int) -> None:
    drawn = random.Random(every)
    values = [20.0 + number // every + drawn.choice((0, 0, 1)) for number in range(60)]
    assert script.has_grown(values, more_than=2)[0]
    assert not script.has_grown(values, more_than=100)[0]


def test_nothing_is_said_of_a_few_rounds(script: ModuleType) -> None:
    assert not script.has_grown([float(number) for number in range(11)], more_than=0)[0]


def test_a_round_that_leaves_nothing_is_right(script: ModuleType, soak: Any) -> None:
    assert play(script, soak, lambda this: (this.folder / "inside").touch()) == []


def test_a_file_and_a_process_that_are_left_are_named_and_removed(script: ModuleType, soak: Any) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def leave(this: Any) -> None:
        (this.soak.folder / "left_file").touch()
        children.append(subprocess.Popen(["sleep", "1000"]))

    problems = play(script, soak, leave)
    assert [problem.split(" left")[0] for problem in problems] == ["1 processes", "1 files"]
    assert "sleep 1000" in problems[0]
    assert "left_file" in problems[1]
    children[0].wait(timeout=10)
    assert play(script, soak, lambda this: None) == []


def test_a_leak_of_descriptors_is_found_over_the_rounds(script: ModuleType, soak: Any) -> None:
    leaked: list[int] = []
    for _ in range(20):
        play(script, soak, lambda this: leaked.append(os.open(os.devnull, os.O_RDONLY)))
    assert soak.wrong == []
    soak.growth()
    for descriptor in leaked:
        os.close(descriptor)
    assert [problem.split(" by")[0] for *_, problem in soak.wrong] == ["descriptors grow"]


def test_an_error_that_blames_another_rank_is_wrong(script: ModuleType, soak: Any) -> None:
    outcomes = (RankOutcome(0, "raised", error_type="RuntimeError"), RankOutcome(1, "died", signal="SIGKILL"))
    right = RankFailure("rank 1 of 2 died: killed by SIGKILL", first=1, outcomes=outcomes)
    wrong = RankFailure("rank 0 of 2 raised RuntimeError", first=0, outcomes=outcomes)
    assert play(script, soak, lambda this: this.require_blames(right, 1, ("died",))) == []
    (problem,) = play(script, soak, lambda this: this.require_blames(wrong, 1, ("died",)))
    assert problem.startswith("blames rank 0, not 1 (died)")


def test_a_round_is_the_same_again(script: ModuleType, soak: Any, tmp_path: Path) -> None:
    plans = []
    for _ in range(2):
        this = script.Round("7", 12, "watch", "mistake", tmp_path, soak)
        plans.append(this.plan("watch", Topology(tp=4)))
    assert plans[0] == plans[1]
    kinds = list(script.KINDS)
    first, again = (list(islice(script.cases("7", kinds, owns_disks=True), 300)) for _ in range(2))
    assert first == again
    some = islice(script.cases("7", ["watch"], owns_disks=True), 20)
    assert all(case in first for case in some if case[0] < 300)
    every_pair = {(kind, fault) for kind, (_, faults) in script.KINDS.items() for fault in faults.split()}
    assert {(kind, fault) for _, kind, fault in first} == every_pair


@pytest.mark.slow
def test_worlds_and_checkpoints_under_faults_end_right_and_leave_nothing() -> None:
    command = [sys.executable, str(SCRIPT), "--minutes", "0.5", "--seed", "3", "--kinds", "world,checkpoint"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert ", 0 wrong, seed 3" in done.stdout
