"""Replicas that part in a running training are named, with rank and step; right loops hear nothing of the guard."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tests.runs import guarded
from tests.runs.guarded import LAST_RIGHT, NORM, WRONG, Counted, Result, train
from tests.runs.loops import right_by_hand as by_hand
from tests.runs.loops.loop import Loop
from tests.runs.loops.right import DEEPSPEED
from tpcheck import Topology, UsageError, World, spawn
from tpcheck.backends.live_groups import LiveGroups
from tpcheck.runs.guarding.guard import Schedule, coverage_line, log_line
from tpcheck.runs.guarding.rounds import Outcome

TP, TP_DP = Topology(tp=2), Topology(tp=2, dp=2)


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with spawn(TP, timeout=120) as world:
        yield world


@pytest.fixture(scope="module")
def grid() -> Iterator[World]:
    with spawn(TP_DP, timeout=120) as world:
        yield world


def same_on_all(results: tuple[Result, ...]) -> Result:
    """Return the first rank's result; the findings, and the call that raised, are the same on every rank."""
    for result in results:
        assert result.text == results[0].text
        assert result.calls == results[0].calls
    return results[0]


# ---- wrong loops


@pytest.mark.parametrize(
    ("training", "field", "ranks"),
    [
        (guarded.NudgesANorm, f"weight {NORM}", [0, 1]),
        (guarded.SpoilsMoments, f"exp_avg_sq of {NORM}", [0, 1]),
        (guarded.NudgesABiasThatBeganAsZero, "weight blocks.1.down.bias", [0, 1]),
    ],
    ids=["a weight", "a moment", "a bias that began as zero"],
)
def test_a_tensor_that_leaves_its_replica_is_named_with_both_ranks(
    pair: World, training: Any, field: str, ranks: list[int]
) -> None:
    result = same_on_all(pair.run(train, training, {}))
    assert result.calls == WRONG
    assert result[0].check == "replicas_agree"
    assert result[0].where["field"] == field
    assert (result[0].where["step"], result[0].where["ranks"]) == (WRONG, ranks)
    assert result[0].cause == "replica_drift"
    assert result[0].evidence["last_right_step"] == LAST_RIGHT
    assert len(result.findings) == 1
    assert "equal at the check after step 2, different at this one, after step 3" in result.text


@pytest.mark.parametrize(
    ("training", "field", "ranks"),
    [(guarded.NudgesANorm, f"weight {NORM}", [1]), (guarded.NudgesAShard, "weight blocks.0.up.weight", [0, 2])],
    ids=["replicated over TP and DP", "sharded over TP"],
)
def test_of_four_ranks_the_one_that_differs_is_named_where_it_has_three_replicas(
    grid: World, training: Any, field: str, ranks: list[int]
) -> None:
    result = same_on_all(grid.run(train, training, {}))
    assert (result[0].where["field"], result[0].where["step"], result[0].where["ranks"]) == (field, WRONG, ranks)
    assert len(result.findings) == 1


@pytest.mark.parametrize(
    ("training", "field", "values"),
    [
        (guarded.SkipsAStep, "optimizer steps", ["3", "2"]),
        (guarded.RaisesTheRate, "learning rate of parameter group 0", ["0.01", "0.0101"]),
        (guarded.ScalesItsLossAlone, "loss scale", ["256.0", "128.0"]),
    ],
    ids=["a step skipped", "the rate", "the loss scale"],
)
def test_a_number_that_differs_is_named_first_with_its_values(
    pair: World, training: Any, field: str, values: list[str]
) -> None:
    result = same_on_all(pair.run(train, training, {}))
    assert (result[0].where["field"], result[0].where["step"]) == (field, WRONG)
    assert result[0].evidence["values"] == {"rank 0": values[0], "rank 1": values[1]}
    assert f"{values[0]} on rank 0, {values[1]} on rank 1" in result.text


def test_a_batch_that_differs_is_named(pair: World) -> None:
    result = same_on_all(pair.run(train, guarded.OtherBatch, {}))
    assert (result[0].check, result[0].where["field"]) == ("batches_agree_within_tp", "input_ids, labels")
    assert (result[0].where["step"], result[0].where["ranks"]) == (WRONG, [0, 1])


def test_a_gradient_that_is_not_a_number_is_named(pair: World) -> None:
    result = same_on_all(pair.run(train, guarded.NotANumber, {}))
    assert result[0].check == "gradients_are_finite"
    assert (result[0].where["parameter"], result[0].where["ranks"]) == (NORM, [0, 1])
    assert (result[0].cause, result[0].where["step"]) == ("not_finite", WRONG)


def test_a_gradient_that_is_never_reduced_is_found_after_the_first_step(pair: World) -> None:
    result = same_on_all(pair.run(train, guarded.PartialGradientOfANorm, {}, every=100))
    assert (result.calls, result[0].where["parameter"], result[0].where["step"]) == (1, NORM, 1)
    assert {entry["name"].split()[0] for entry in result[0].evidence["also"]} == {NORM}


@pytest.mark.parametrize(
    ("training", "parameter"),
    [
        (guarded.PartialGradientOfACustomNorm, "blocks.0.norm.weight"),
        (guarded.NudgesACustomScale, "blocks.1.norm.1.weight"),
    ],
    ids=["a norm on each rank's positions", "a scale of what all ranks have"],
)
def test_ones_that_part_at_the_first_step_are_found_where_no_backend_knows_them(
    pair: World, training: Any, parameter: str
) -> None:
    result = same_on_all(pair.run(train, training, {}, every=100))
    assert (result.calls, result[0].where["parameter"], result[0].where["step"]) == (1, parameter, 1)
    assert result[0].cause == "replica_drift"


def test_a_warning_comes_once_for_each_tensor(pair: World) -> None:
    result = same_on_all(pair.run(train, guarded.RaisesTheRate, {"steps": 9}, on_mismatch="warn"))
    assert result.calls == 9
    assert [entry["replicas_agree"] for entry in result.logged] == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    first, second, _ = result.warned  # the rate; the weights that it has moved; then their gradients
    assert "learning rate" in first
    assert "weight embedding.weight" not in first
    assert "embedding.weight" in second


def test_a_callable_gets_every_report(pair: World) -> None:
    for result in pair.run(train, guarded.NudgesANorm, {}, calls_back=True):
        assert result.calls == Counted.steps
        assert result[0].where["field"] == f"weight {NORM}"
        assert {finding.evidence.get("last_right_step") for finding in result.findings} >= {LAST_RIGHT}


# ---- right loops


@pytest.mark.parametrize(
    ("training", "options"),
    [
        (Counted, {}),
        (Counted, {"accumulate": 3}),
        (guarded.ZeroBiases, {}),
        (guarded.ScalesShards, {}),
        (by_hand.Evaluated, {"steps": 4, "accumulate": 2}),
        (by_hand.WithGradScalerAndOverflow, {"steps": 5}),
        (by_hand.Autocast, {"steps": 3}),
    ],
    ids=[
        "plain",
        "accumulation",
        "biases of zeros",
        "ones on shards",
        "evaluation",
        "a scaler that skips a step",
        "autocast",
    ],
)
def test_a_right_loop_over_tp_is_not_disturbed(pair: World, training: Any, options: dict[str, Any]) -> None:
    for result in pair.run(train, training, {"accumulate": 1, **options}):
        assert (result.text, result.failure, result.warned) == ("", "", [])
        assert all(entry["replicas_agree"] for entry in result.logged)
    assert pair.run(train, training, options)[0].logged[-1]["tensors_compared"] > 10


@pytest.mark.parametrize(
    ("training", "options"),
    [(Counted, {"accumulate": 2}), (by_hand.ByDdp, {"steps": 4, "accumulate": 2})],
    ids=["gradients reduced by hand", "DistributedDataParallel"],
)
def test_a_right_loop_over_tp_and_dp_is_not_disturbed(grid: World, training: Any, options: dict[str, Any]) -> None:
    for result in grid.run(train, training, options):
        assert (result.text, result.failure) == ("", "")


ENGINES = [
    loop for loop in DEEPSPEED if "float64" in loop.name and not loop.name.endswith("float64, two micro-batches")
]


@pytest.mark.parametrize("loop", ENGINES, ids=lambda loop: loop.name)
def test_an_engine_at_each_stage_is_not_disturbed(pair: World, grid: World, loop: Loop) -> None:
    pytest.importorskip("deepspeed")
    world = pair if loop.actual.topology == TP else grid
    options = {**dict(loop.actual.options), "steps": 3}
    results = world.run(train, loop.actual.training, options)
    for result in results:
        assert (result.text, result.failure) == ("", "")
    assert [entry["step"] for entry in results[0].logged][-1] == 2
    assert results[0].logged[-1]["tensors_compared"] > 20
    assert results[0].logged[-1]["gradient_norm"] > 0


# ---- when it checks, and what it says


def steps_of(result: Result) -> list[float]:
    return [entry["step"] for entry in result.logged]


def test_checks_come_after_the_first_step_and_then_after_every_so_many(pair: World) -> None:
    assert steps_of(pair.run(train, Counted, {"steps": 8}, every=3)[0]) == [0, 1, 3, 6]
    # Until a step is seen, after 1, 2 and 4 calls; then at the first call after the step.
    accumulating = pair.run(train, Counted, {"steps": 8, "accumulate": 3}, every=3)[0]
    assert steps_of(accumulating) == [0, 0, 0, 1, 3, 6]


def test_numbers_are_logged_on_rank_0_alone(pair: World) -> None:
    first, second = pair.run(train, Counted, {"steps": 3}, every=2)
    assert second.logged == []
    numbers = first.logged[-1]
    assert set(numbers) == {
        *("step", "replicas_agree", "tensors_compared", "gradient_norm", "loss_scale", "skipped_steps"),
        *("learning_rate", "seconds"),
    }
    assert (numbers["learning_rate"], numbers["loss_scale"], numbers["skipped_steps"]) == (0.01, 1, 0)


def test_the_norm_is_that_of_the_whole_model_at_any_topology(pair: World, grid: World) -> None:
    options = {"steps": 2, "accumulate": 2}
    over_tp, over_both = (world.run(train, Counted, options)[0].logged[-1] for world in (pair, grid))
    assert over_tp["gradient_norm"] == pytest.approx(over_both["gradient_norm"], rel=1e-12)
    alone: list[dict[str, float]] = []
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    with tpcheck.guard(model, log=alone.append):
        for _ in range(2):
            model(torch.tensor([[3.0, 4.0]])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert alone[-1]["gradient_norm"] == pytest.approx(5.0)


def test_without_a_callable_each_check_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with caplog.at_level(logging.INFO, "tpcheck"), tpcheck.guard(model, optimizer=optimizer):
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert caplog.messages == [
        "step 0: this rank has no replicas; loss scale 1, lr 0.5",
        "guard: 0 tensors of this rank are compared; 4 are on no other rank (shards, partitions) or not known to be",
        "step 1: this rank has no replicas; gradient norm 1.73205, loss scale 1, lr 0.5",
    ]


def test_the_line_names_groups_and_counts_tensors() -> None:
    outcome = Outcome(100, 100, 1.25, (), (), 291, 7, {})
    line = log_line(outcome, LiveGroups(0, (0, 1), (0, 2), "topology"), 1.25, 1.0, [0.001, 0.001])
    assert line == (
        "step 100: 291 tensors agree in TP group (0, 1) and DP group (0, 2); gradient norm 1.25, loss scale 1, lr 0.001"
    )


def test_what_is_not_compared_is_said_with_its_reason() -> None:
    outcome = Outcome(1, 1, None, (), (), 20, 4, {})
    line = coverage_line(outcome, {"up.weight": "unknown", "down.weight": "unknown", "experts.0": "of an expert"})
    assert line == (
        "guard: 20 tensors of this rank are compared; 4 are on no other rank (shards, partitions) or not known to be; "
        "up.weight, down.weight: unknown; experts.0: of an expert"
    )


def test_a_gradient_that_is_not_finite_is_named_on_one_process() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    inputs = torch.tensor([[1.0, float("inf")]])
    with tpcheck.guard(model):
        model(inputs).sum().backward()
        optimizer.step()
        with pytest.raises(tpcheck.Mismatch, match=r"gradients_are_finite  weight[^*]+infinite or NaN"):
            model(inputs)


def test_a_gradient_of_a_closure_that_is_not_finite_is_named_before_the_next_step() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())

    def passes_of_step(inputs: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(inputs).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with tpcheck.guard(model):
        optimizer.step(lambda: passes_of_step(torch.tensor([[1.0, float("inf")]])))
        with pytest.raises(tpcheck.Mismatch, match="gradients_are_finite  weight"):
            optimizer.step(closure=lambda: passes_of_step(torch.ones(1, 2)))


def test_a_log_that_raises_is_said_once_and_the_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    calls = []

    def log(numbers: Any) -> None:
        calls.append(numbers["step"])
        raise ConnectionError("the tracker is gone")

    def train(steps: int) -> None:
        with tpcheck.guard(model, every=1, log=log):
            for _ in range(steps):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()

    with pytest.warns(
        RuntimeWarning, match="log= .* raised ConnectionError: the tracker is gone. The guard goes on"
    ) as said:
        train(3)
    assert (calls, len(said)) == ([0, 1, 2], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(2)
    assert "the tracker is gone" in caplog.text


def test_nothing_is_left_of_a_guard_that_was_removed() -> None:
    model = nn.Linear(2, 1)
    logged: list[Any] = []
    handle = tpcheck.guard(model, log=logged.append)
    model(torch.ones(1, 2))
    handle.remove()
    handle.remove()
    model(torch.ones(1, 2))
    assert len(logged) == 1
    assert not model._forward_pre_hooks


def test_calls_without_gradients_and_recomputations_are_not_counted() -> None:
    logged: list[Any] = []
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with tpcheck.guard(model, log=logged.append):
        with torch.no_grad():
            model(torch.ones(1, 2))
        assert logged == []
        output = torch.utils.checkpoint.checkpoint(model, torch.ones(1, 2, requires_grad=True), use_reentrant=False)
        output.sum().backward()
    assert len(logged) == 1


@pytest.mark.parametrize(
    ("calls", "steps", "calls_at_step", "expected"),
    [(4, 1, 3, 30), (31, 10, 30, 60), (5, 2, 4, 20)],
    ids=["three calls a step", "the same later", "two calls a step"],
)
def test_the_next_check_is_at_the_call_after_the_step(
    calls: int, steps: int, calls_at_step: int, expected: int
) -> None:  # fmt: skip
    schedule = Schedule(every=10)
    schedule.advance(calls, steps, calls_at_step)
    assert schedule.next_call == expected
    assert not schedule.has_check_before_next_step(calls)
    assert schedule.has_check_before_next_step(expected)


def test_checks_go_on_while_every_step_is_skipped() -> None:
    schedule = Schedule(every=10)
    schedule.advance(1, 1, 1)
    schedule.advance(10, 1, 1)
    assert schedule.next_call == 11


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"every": 0}, "a positive integer"),
        ({"on_mismatch": "ignore"}, "raise, warn, or a callable"),
        ({"log": 1}, "a callable that takes a dict of numbers"),
        ({"timeout": 0}, "seconds above 0"),
        ({"topology": TP}, "torch.distributed is not initialised"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], accepted: str) -> None:
    with pytest.raises(UsageError, match=accepted):
        tpcheck.guard(nn.Linear(1, 1), **options)


# ---- ranks that are gone


def test_a_rank_that_raises_is_named_by_the_others(pair: World) -> None:
    with pytest.raises(tpcheck.RankFailure, match="the loop is wrong") as raised:
        pair.run(train, guarded.Raises, {})
    assert raised.value.first == 1


@pytest.mark.parametrize("every", [1, 100], ids=["found by a check", "found when a collective fails"])
def test_a_rank_that_is_killed_is_named_within_seconds(every: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    script = f"from tests.runs.guarded import die_in_a_loop; die_in_a_loop({every}, victim=1)"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **environ, "RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        text = ranks[0].communicate(timeout=90)[0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert "END" in text, text
    began = float(text.split("START ")[1].split()[0])
    ended, first = text.split("END ")[1].split()[:2]
    assert float(ended) - began < 5, text
    assert int(first) == 1
    assert "rank 1 of TP group (0, 1)" in text
