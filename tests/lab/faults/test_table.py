"""The corpus of faults: whole, distinct, drawn the same for the same seed, and caught as the committed table says."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tests.core.test_causes import SLUGS
from tests.lab.faults.finding import LEAST_MARGIN, REPLAYS
from tpcheck import Topology
from tpcheck.families.build import small_model
from tpcheck.lab.faults.corpus import CHECKPOINT_FAULTS, DATA_FAULTS, FAULTS, MODEL_FAULTS, Fault
from tpcheck.lab.faults.data import AGREE, DIFFER
from tpcheck.lab.faults.fault import Draw, Live, ModelFault, Planting
from tpcheck.lab.faults.report import summary
from tpcheck.lab.faults.results import Caught, Score
from tpcheck.lab.faults.runs import run_model_fault
from tpcheck.lab.faults.table import Task, fault_tasks
from tpcheck.numerics.checks import CHECK_NAMES, CHECKPOINT_CHECK
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.explain import applicable

ROOT = Path(__file__).parents[3]
WORST_NOISE = 0.2  # in float64
UNPLANTED = {"rng_differs_cuda": "needs a GPU"}
OF_TERMS = "the ranks' outputs show it, and so do the terms that each rank's own inputs and weights give"
TOLD_TWICE = {
    "tensor_of_another_layer": "the whole weight shows it, and so does each rank's part",
    "missing_reduce": OF_TERMS,
    "duplicate_reduce": OF_TERMS,
    "mean_instead_of_sum": OF_TERMS,
}


def test_there_are_more_than_sixty_faults_of_models_and_every_name_is_its_own() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(MODEL_FAULTS) >= 60
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_says_what_it_is(fault: Fault) -> None:
    assert fault.name.replace("_", "").isalnum()
    assert fault.name.islower()
    assert len(fault.what.split()) >= 4
    assert not fault.what.endswith(".")
    assert fault.checks
    assert fault.causes
    assert fault.link is None or fault.link.startswith("https://")


def test_every_check_has_a_fault() -> None:
    assert {check for fault in FAULTS for check in fault.checks} == {*CHECK_NAMES, CHECKPOINT_CHECK, AGREE, DIFFER}


def test_every_cause_is_the_right_one_of_a_fault() -> None:
    planted = {cause for fault in FAULTS for cause in fault.causes} - {None}
    assert planted == SLUGS - set(UNPLANTED)


def test_a_seed_draws_the_same_place_and_seeds_draw_several() -> None:
    model = small_model("llama")
    names = [name for name, _ in model.named_modules()]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fault = next(fault for fault in MODEL_FAULTS if fault.name == "row_parallel_reduce_skipped")
    places = [fault.drawn(names, shapes, seed).place for seed in range(12)]
    assert places == [fault.drawn(names, shapes, seed).place for seed in range(12)]
    assert len(set(places)) > 2


def test_seeds_draw_topologies_in_which_a_fault_is_the_same_bug() -> None:
    by_name = {fault.name: fault for fault in MODEL_FAULTS}
    drawn = [by_name["row_parallel_reduce_skipped"].seeded(seed).topology for seed in range(3)]
    assert drawn == [Topology(tp=2), Topology(tp=4), Topology(tp=2, dp=2)]
    assert by_name["row_parallel_reduced_over_dp"].seeded(1).topology == Topology(tp=2, dp=2)  # it needs one


def test_names_and_kinds_choose_runs() -> None:
    assert [task.name for task in fault_tasks(["saved_one_bit"], seeds=(3, 4))] == ["saved_one_bit"] * 2
    assert {task.kind for task in fault_tasks(kinds=["data", "checkpoint"])} == {"data", "checkpoint"}
    assert len(list(fault_tasks())) == len(FAULTS)


def test_the_committed_table_has_every_fault() -> None:
    assert {row.fault for row in committed().faults} == {fault.name for fault in FAULTS}


def test_the_committed_table_is_good_and_far_above_the_noise() -> None:
    score = committed()
    assert score.is_good
    assert score.least is not None
    assert score.worst is not None
    assert score.least.margin > LEAST_MARGIN
    assert score.worst.margin < WORST_NOISE


def test_the_readme_shows_what_the_committed_table_comes_to() -> None:
    readme = (ROOT / "README.md").read_text()
    for label, text, _ in summary(committed()):
        assert f"  {label:<10}{text}\n" in readme


def committed() -> Score:
    """Return the table that `ci/faults` wrote."""
    table = json.loads((ROOT / "docs" / "faults.json").read_text())
    return Score.of(
        Caught(**{key: value for key, value in row.items() if key != "outcome"} | {"margin": margin(row)})
        for row in [*table["faults"], *table["controls"]]
    )


def margin(row: dict[str, Any]) -> float:
    return inf if row["margin"] is None else float(row["margin"])


@pytest.mark.parametrize("fault", DATA_FAULTS[::6], ids=lambda fault: fault.name)  # tests/pipelines runs them all
def test_a_fault_of_the_data_is_caught_in_place_by_name(fault: Fault) -> None:
    for task in fault_tasks([fault.name], seeds=range(2)):
        assert_right(task.run())


def test_faults_of_checkpoints_are_caught_in_place_by_name() -> None:
    for task in fault_tasks([fault.name for fault in CHECKPOINT_FAULTS], seeds=range(3)):
        assert_right(task.run())


def test_a_run_that_raises_is_a_row() -> None:
    def run() -> Caught:
        raise RuntimeError("boom")

    row = Task("name", "kind", "what", 3, run).run()
    assert (row.verdict, row.message, row.seed) == ("error", "RuntimeError: boom", 3)


def one_of_each_cause() -> Iterator[ModelFault]:
    """Yield the first fault of each cause; the tests of each table of faults run all of them."""
    causes = dict.fromkeys(cause for fault in MODEL_FAULTS for cause in fault.causes if cause is not None)
    for cause in causes:
        yield next(fault for fault in MODEL_FAULTS if fault.causes[0] == cause)


@pytest.mark.parametrize("fault", list(one_of_each_cause()), ids=lambda fault: fault.causes[0])
def test_a_cause_is_named_by_its_test_and_by_no_other(fault: ModelFault, tmp_path: Path) -> None:
    """Without the test that names it, the same numbers are given another cause or none."""
    row = run_model_fault(replace(fault, draw=recording(fault.draw, tmp_path)), replays=REPLAYS)
    assert_right(row)
    suspects = [pickle.loads(path.read_bytes()) for path in sorted(tmp_path.glob("*.pickle"))]
    assert any(is_needed(suspect, str(row.cause)) for suspect in suspects) != (row.cause in TOLD_TWICE)


def assert_right(row: Caught) -> None:
    assert row.caught, row.message
    assert row.place_is_right, (row.place, row.true_places)
    assert row.cause_is_right, (row.cause, row.true_causes)
    assert row.margin > LEAST_MARGIN


def is_needed(suspect: Suspect, cause: str) -> bool:
    """Return whether a suspect has the cause, and has another or none when the test that named it is taken away."""
    first, second, *_ = (*(found.cause.slug for test in applicable(suspect) if (found := test(suspect))), None, None)
    return first == cause != second


def recording(draw: Callable[[Draw], Planting], folder: Path) -> Callable[[Draw], Planting]:
    """Plant the same fault, and keep every suspect that a cause is looked for on a rank."""

    def drawn(chosen: Draw) -> Planting:
        planting = draw(chosen)

        def plant(live: Live) -> None:
            from tpcheck.numerics import answer

            explain = answer.explain

            def recorded(suspect: Suspect) -> Any:
                number = len(list(folder.iterdir()))
                (folder / f"{live.rank.rank}-{number:04d}.pickle").write_bytes(pickle.dumps(suspect))
                return explain(suspect)

            answer.explain = recorded
            planting.plant(live)

        return Planting(plant, planting.place)

    return drawn
