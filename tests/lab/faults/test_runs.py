"""The corpus of faults: complete, distinct, drawn by the seed, and caught as the committed table says."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from tests.lab.faults.test_model_faults import LEAST_MARGIN
from tests.schema import document
from tpcheck import Topology, UsageError
from tpcheck.core.causes import Cause
from tpcheck.families.build import small_model
from tpcheck.lab.faults.corpus import CHECKPOINT_FAULTS, DATA_FAULTS, FAULTS, MODEL_FAULTS
from tpcheck.lab.faults.data import AGREE, DIFFER, ONCE
from tpcheck.lab.faults.report import summary
from tpcheck.lab.faults.results import KINDS, FaultResult, Score
from tpcheck.lab.faults.runs import (
    FaultRun,
    Tolerances,
    control_runs,
    fault_runs,
    run_data_control,
    run_model_fault,
)
from tpcheck.numerics.checks import CHECK_NAMES, ON_REQUEST

ROOT = Path(__file__).parents[3]
WORST_NOISE = 0.2  # in float64
WITHOUT_A_FAULT = {
    "rng_differs_cuda": "needs a GPU",
}


def test_every_fault_has_its_own_name_a_sentence_checks_and_causes() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert fault.name.replace("_", "").isalnum()
        assert fault.name.islower()
        assert len(fault.what.split()) >= 4, fault.name
        assert not fault.what.endswith("."), fault.name
        assert fault.checks
        assert fault.causes
        assert fault.link is None or fault.link.startswith("https://")


def test_every_kind_of_fault_can_be_asked_for() -> None:
    assert {fault.kind for fault in FAULTS} == {*KINDS}


def test_every_check_and_every_cause_has_a_fault() -> None:
    assert {check for fault in FAULTS for check in fault.checks} == {*CHECK_NAMES, *ON_REQUEST, AGREE, DIFFER, ONCE}
    causes = {cause for fault in FAULTS for cause in fault.causes} - {None}
    of_runs = {
        cause.slug for cause in Cause if all(module.startswith("runs.") for module in cause.diagnosed_in)
    }  # tests/runs/test_wrong_loops.py has loops for them
    assert causes == {cause.slug for cause in Cause} - set(WITHOUT_A_FAULT) - of_runs


def test_what_rounding_does_is_measured_for_the_first_fault_of_a_training() -> None:
    first, other = (
        next(fault for fault in MODEL_FAULTS if fault.name == name)
        for name in ("row_parallel_reduced_twice", "row_parallel_reduce_skipped")
    )
    tolerances: Tolerances = {}
    run_model_fault(first, replays=2, tolerances=tolerances)
    ((training, measured),) = tolerances.items()
    alone = run_model_fault(other, replays=2)
    tolerances[training] = replace(measured, deviations={key: 1e3 * size for key, size in measured.deviations.items()})
    assert run_model_fault(other, replays=2, tolerances=tolerances).margin == pytest.approx(alone.margin / 1e3)


def test_equal_seeds_draw_equal_places_and_seeds_draw_several() -> None:
    model = small_model("llama")
    names = [name for name, _ in model.named_modules()]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fault = next(fault for fault in MODEL_FAULTS if fault.name == "row_parallel_reduce_skipped")
    places = [fault.injection(names, shapes, seed).place for seed in range(12)]
    assert places == [fault.injection(names, shapes, seed).place for seed in range(12)]
    assert len(set(places)) > 2


def test_seeds_select_topologies_in_which_a_fault_is_the_same_bug() -> None:
    by_name = {fault.name: fault for fault in MODEL_FAULTS}
    topologies = [by_name["row_parallel_reduce_skipped"].at_seed(seed).topology for seed in range(3)]
    assert topologies == [Topology(tp=2), Topology(tp=4), Topology(tp=2, dp=2)]
    assert by_name["row_parallel_reduced_over_dp"].at_seed(1).topology == Topology(tp=2, dp=2)  # it needs dp


def test_names_and_kinds_select_runs() -> None:
    assert [run.name for run in fault_runs(["saved_one_bit"], seeds=(3, 4))] == ["saved_one_bit"] * 2
    assert {run.kind for run in fault_runs(kinds=["data", "checkpoint"])} == {"data", "checkpoint"}
    assert len(list(fault_runs())) == len(FAULTS)
    with pytest.raises(UsageError, match="did you mean saved_one_bit"):
        fault_runs(["saved_one_bits"])


def test_controls_are_the_runs_of_the_committed_table() -> None:
    assert len(list(control_runs())) == len(committed().controls)


def test_the_committed_table_has_every_fault_and_stands_far_above_the_noise() -> None:
    score = committed()
    assert {result.fault for result in score.faults} == {fault.name for fault in FAULTS}
    assert score.is_good
    assert score.least is not None
    assert score.worst is not None
    assert score.least.margin > LEAST_MARGIN
    assert score.worst.margin < WORST_NOISE


def test_the_documentation_shows_the_totals_of_the_committed_table() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    for label, cell in summary(committed()):
        assert f"  {label:<10}{cell.text}\n" in page


def committed() -> Score:
    """Return the table that `ci/faults` has written."""
    table = document(ROOT / "docs" / "faults.json", "faults")
    rows = [*table["faults"], *table["controls"]]
    margins = [inf if row["margin"] is None else row["margin"] for row in rows]
    return Score.of(
        FaultResult(**{key: value for key, value in row.items() if key != "outcome"} | {"margin": margin})
        for row, margin in zip(rows, margins, strict=True)
    )


def test_a_data_fault_is_caught_and_its_fixed_pipeline_is_clean() -> None:
    """tests/batches/pipelines runs every data fault."""
    fault = next(fault for fault in DATA_FAULTS if fault.name == "data_listed_files")
    (run,) = fault_runs([fault.name])
    result = run.run()
    assert result.is_right, result
    assert run_data_control(fault).is_right


def test_checkpoint_faults_of_small_models_are_caught_at_their_place_with_a_right_cause() -> None:
    """tests/checkpoints damages tensors of every kind, in every format and with several seeds."""
    for run in fault_runs([fault.name for fault in CHECKPOINT_FAULTS]):
        result = run.run()
        assert result.is_right, result
        assert result.margin > LEAST_MARGIN


def test_a_run_that_raises_becomes_a_result() -> None:
    def run() -> FaultResult:
        raise RuntimeError("boom")

    result = FaultRun("name", "kind", "what", 3, run).run()
    assert (result.verdict, result.message, result.seed) == ("error", "RuntimeError: boom", 3)
