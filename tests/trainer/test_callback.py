"""transformers' Trainer with the callback: the findings and their causes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tests.trainer.training import save_model, train
from tpcheck import Topology, UsageError, World, spawn

TP, TP_DP = Topology(tp=2), Topology(tp=2, dp=2)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    save_model(tmp_path)
    return str(tmp_path)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """DeepSpeed and accelerate keep state in the process, so each test has a new world."""
    with spawn(request.param, timeout=120) as world:
        yield world


@pytest.mark.parametrize("world", [TP], indirect=True, ids=str)
def test_the_trainer_seeds_workers_by_world_rank(world: World, folder: str) -> None:
    findings, steps = world.run(train, folder, deepspeed=True, workers=1)[0]
    first = findings[0]
    assert (steps, first.cause, first.where["field"]) == (0, "rng_differs_torch", "input_ids")
    assert first.evidence["where"] == "workers"
    assert first.evidence["worker_init_fn"] == [
        f"transformers.trainer_utils.seed_worker(num_workers=1, rank={rank})" for rank in (0, 1)
    ]
    assert first.evidence["advice"].startswith("Seed workers by dp_rank")


@pytest.mark.parametrize("world", [TP_DP], indirect=True, ids=str)
def test_workers_seeded_by_dp_rank_get_equal_batches(world: World, folder: str) -> None:
    assert world.run(train, folder, deepspeed=True, workers=1, seed_workers_by_dp_rank=True)[0] == ([], 4)


@pytest.mark.parametrize("world", [TP], indirect=True, ids=str)
def test_workers_of_a_model_that_transformers_shards_are_seeded_by_world_rank(world: World, folder: str) -> None:
    findings, steps = world.run(train, folder, deepspeed=False, workers=1)[0]
    assert (steps, findings[0].cause, findings[0].evidence["where"]) == (0, "rng_differs_torch", "workers")


@pytest.mark.parametrize("world", [TP], indirect=True, ids=str)
def test_a_model_that_transformers_shards_gets_equal_batches_without_workers(world: World, folder: str) -> None:
    assert world.run(train, folder, deepspeed=False)[0] == ([], 4)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of step 3."""
    path = tmp_path_factory.mktemp("run")
    save_model(path)
    with spawn(TP, timeout=120) as world:
        assert world.run(train, str(path), deepspeed=True, steps=3, save_steps=3)[0] == ([], 3)
    return path


@pytest.mark.parametrize("world", [TP], indirect=True, ids=str)
@pytest.mark.parametrize("missing", [True, False])
def test_a_run_that_resumes_without_one_ranks_generators_is_found(
    world: World, saved_run: Path, tmp_path: Path, missing: bool
) -> None:
    copy = Path(shutil.copytree(saved_run, tmp_path / "run"))
    if missing:
        (copy / "out" / "checkpoint-3" / "rng_state_1.pth").unlink()
    findings, steps = world.run(train, str(copy), deepspeed=True, steps=6, save_steps=3, resume=True)[0]
    if missing:
        assert 3 <= steps < 6  # the first batches are drawn before the generators are restored
        assert (findings[0].cause, findings[0].evidence["where"]) == ("rng_differs_torch", "the main process")
    else:
        assert (findings, steps) == ([], 6)


# ---- record and guard


@pytest.mark.parametrize("world", [TP], indirect=True, ids=str)
@pytest.mark.parametrize("deepspeed", [True, False])
def test_a_training_is_recorded_and_guarded(world: World, folder: str, deepspeed: bool) -> None:
    trace = f"{folder}/run.trace"
    options = {"record": {"path": trace, "replays": 0}, "guard": 2}
    assert world.run(train, folder, deepspeed=deepspeed, callback_options=options)[0] == ([], 4)
    report = tpcheck.compare_traces(trace, trace)
    assert report.verdict.coverage.compared, report.to_text()
    assert report.passed, report.to_text()


def begin(callback: tpcheck.TpcheckCallback, steps: int) -> nn.Module:
    """Take steps as the Trainer would, without its end."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    for _ in range(steps):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_end_of_a_training_ends_its_trace(tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []
    trace = tmp_path / "run.trace"
    callback = tpcheck.TpcheckCallback(record=trace, guard={"every": 2, "log": logged.append})
    model = begin(callback, steps=3)
    callback.on_train_end(None, None, None)
    assert not model._forward_pre_hooks
    assert [entry["step"] for entry in logged] == [0, 1, 2]
    assert tpcheck.compare_traces(trace, trace).passed


def test_a_training_that_raises_leaves_a_trace_that_reads_and_no_hooks_once_another_begins(tmp_path: Path) -> None:
    trace = tmp_path / "run.trace"
    callback = tpcheck.TpcheckCallback(record=trace, guard=1)
    model = begin(callback, steps=3)
    begin(callback, steps=0)
    assert not model._forward_pre_hooks
    callback.close()


def test_a_callback_that_is_dropped_removes_its_hooks(tmp_path: Path) -> None:
    trace = tmp_path / "run.trace"
    model = begin(tpcheck.TpcheckCallback(record=trace, guard=1), steps=3)
    assert not model._forward_pre_hooks
    assert tpcheck.compare_traces(trace, trace).passed  # up to its last whole step


def test_a_record_without_a_path_is_refused() -> None:
    with pytest.raises(UsageError, match="with `path`"):
        tpcheck.TpcheckCallback(record={"steps": [0]})


@pytest.mark.parametrize("record", [3, {}, {"path": "x", "model": None}, {"path": "x", "pth": "y"}])
def test_a_record_that_is_wrong_is_refused_before_the_training(record: Any) -> None:
    with pytest.raises(UsageError, match=r"record=.*a path, or a dict"):
        tpcheck.TpcheckCallback(record=record)


@pytest.mark.parametrize("guard", [0, True, "100", {"evry": 2}])
def test_a_guard_that_is_wrong_is_refused_before_the_training(guard: Any) -> None:
    with pytest.raises(UsageError, match=r"guard=.*a positive number of steps, or a dict"):
        tpcheck.TpcheckCallback(guard=guard)
