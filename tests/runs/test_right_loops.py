"""Training loops that are right pass, whatever they do between two optimizer steps and whatever shards the model."""

from collections.abc import Iterator

import pytest

from tests.runs.loops.loop import Loop
from tests.runs.loops.right import LOOPS, SELDOM
from tests.runs.loops.worlds import LoopRunner, as_parameters, loop_runner


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


def test_the_table_of_right_loops_is_long_enough() -> None:
    assert len(LOOPS) >= 30
