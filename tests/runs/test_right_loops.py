"""Training loops that are right pass, whatever they do between two optimizer steps and whatever shards the model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tpcheck
from tests.runs.loops.engines import DeepSpeed
from tests.runs.loops.huggingface import SyncsAtTheLast
from tests.runs.loops.loop import Loop, Side
from tests.runs.loops.right import DP2, LOOPS, SELDOM, TP2
from tests.runs.loops.worlds import LoopRunner, as_parameters, loop_runner
from tpcheck.runs.trace.files import read_trace


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopRunner]:
    with loop_runner(tmp_path_factory.mktemp("right")) as made:
        yield made


@pytest.mark.parametrize("loop", as_parameters(LOOPS, SELDOM))
def test_a_right_loop_passes(runner: LoopRunner, loop: Loop) -> None:
    compared = runner.compare(loop)
    if loop.agreement is not None:
        assert compared.difference <= loop.agreement, "the loop itself is wrong"
    report = compared.report
    assert report.passed, report.to_text()
    counts = {check.check: check.compared for check in report.verdict.checks}
    for check in ("outputs_match_reference", "gradients_match_reference", "updates_match_reference"):
        assert counts.get(check), f"{check} compared nothing: {report.to_text()}"


def test_replays_of_zero_3_are_refused_in_a_sentence(runner: LoopRunner, tmp_path: Path) -> None:
    options = (("zero", 3), ("dtype", torch.float32), ("steps", 1))
    runner.run(Side(DeepSpeed, TP2, options, (("replays", 2),)), tmp_path / "run.trace")
    report = tpcheck.compare_traces(tmp_path / "run.trace", tmp_path / "run.trace")
    assert report.passed
    [reason] = [why for name, why in report.verdict.coverage.not_compared.items() if name.startswith("replays of ")]
    assert reason.startswith("ZeRO 3 gathers parameters only inside its own hooks: record the run that this one")


def test_the_calls_of_a_step_that_an_engine_skips_are_a_step_by_themselves(runner: LoopRunner, tmp_path: Path) -> None:
    options = (("dtype", torch.float16), ("zero", 1), ("scale_power", 30), ("steps", 2))
    runner.run(Side(DeepSpeed, TP2, options), tmp_path / "run.trace")
    steps = read_trace(tmp_path / "run.trace")[0].steps
    assert [(len(step.passes), step.is_skipped) for step in steps] == [(1, True), (1, True)]


def test_replays_leave_the_gradients_of_fsdp_to_the_loop(runner: LoopRunner, tmp_path: Path) -> None:
    loop = Side(SyncsAtTheLast, DP2, (("steps", 1), ("accumulate", 2)), (("replays", 2),))
    weights, recorded = runner.run(loop, None)[0], runner.run(loop, tmp_path / "run.trace")[0]
    assert all(torch.equal(recorded[name], weight) for name, weight in weights.items())
    [step] = read_trace(tmp_path / "run.trace")[0].steps
    assert (len(step.passes), step.has_update) == (2, True)
    report = tpcheck.compare_traces(tmp_path / "run.trace", tmp_path / "run.trace")
    assert {check.check: check.compared for check in report.verdict.checks}["gradients_match_reference"] > 20
    assert not [name for name in report.verdict.coverage.not_compared if name.startswith(("replays", "step"))]


def test_the_table_of_right_loops_is_long_enough() -> None:
    assert len(LOOPS) >= 30
