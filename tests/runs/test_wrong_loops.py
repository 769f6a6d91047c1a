"""Training loops with one injected fault each are caught, placed and named."""

from collections.abc import Iterator

import pytest

from tests.runs.loops.loop import Loop, complaints
from tests.runs.loops.worlds import LoopRunner, as_parameters, loop_runner
from tests.runs.loops.wrong import LOOPS, SELDOM
from tests.runs.test_slices import WRONG as WRONG_SLICES
from tests.schema import document
from tpcheck.core.causes import Cause


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopRunner]:
    with loop_runner(tmp_path_factory.mktemp("wrong")) as made:
        yield made


@pytest.mark.parametrize("loop", as_parameters(LOOPS, SELDOM))
def test_a_wrong_loop_is_caught_placed_and_named(runner: LoopRunner, loop: Loop) -> None:
    compared = runner.compare(loop)
    if loop.agreement is not None:
        assert compared.difference > loop.agreement, "the fault changes nothing"
    assert loop.wrong is not None
    missing = complaints(compared.report, loop.wrong)
    assert not missing, "\n".join([*missing, compared.report.to_text()])
    if loop is LOOPS[0]:
        document(compared.report.to_json(), "report")


def test_the_table_of_wrong_loops_is_long_enough() -> None:
    assert len(LOOPS) >= 30


def test_every_cause_that_only_runs_have_is_named_of_a_loop() -> None:
    of_runs = {cause.slug for cause in Cause if all(module.startswith("runs.") for module in cause.diagnosed_in)}
    of_loops = {loop.wrong.cause for loop in LOOPS if loop.wrong is not None}
    assert of_runs <= of_loops | {cause for *_, cause, _ in WRONG_SLICES}
