"""Two runs made by hand, right and wrong: what the comparison says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from math import hypot, inf, sqrt
from typing import Any

import pytest
import torch

from tests.runs import hand_made
from tests.runs.hand_made import (
    BATCH,
    LENGTH,
    OUTPUTS,
    WEIGHTS,
    WIDTH,
    Edit,
    Place,
    bias,
    initial_weights,
    micro_batch_gradients,
    run,
    wholes,
)
from tpcheck.core.causes import Cause
from tpcheck.core.findings import Finding
from tpcheck.core.name_maps import NameMap
from tpcheck.numerics.sketch import sketch
from tpcheck.report.json_values import verdict_json
from tpcheck.report.report import Report
from tpcheck.runs.comparing.alignment import Run
from tpcheck.runs.comparing.compare import compare_runs
from tpcheck.runs.comparing.state_causes import stale_masters, stale_or_lost
from tpcheck.runs.trace.records import RankTrace, Reading, StepRecord, TensorRecord

NORM, UP, DOWN = "layers.0.norm.weight", "layers.0.up.weight", "layers.0.down.weight"
Traces = tuple[RankTrace, ...]


def compared(actual: Traces, expected: Traces | None = None, names: NameMap | None = None) -> Report:
    return compare_runs(Run.of("actual", actual), Run.of("expected", expected or unsharded()), names)


@cache
def unsharded() -> Traces:
    return run(rounding=1.0, seed=5)


@cache
def unsharded_in_three_micro_batches() -> Traces:
    return run(rounding=1.0, seed=5, passes=3, accumulated=True)


def require_passed(report: Report) -> None:
    assert report.passed, report.to_text(findings=None)


def the_finding(report: Report) -> Finding:
    """Return the first finding; what follows from it names it."""
    first, *others = report.findings
    assert all(other.cause is not None or other.evidence["follows_from"] == first.check for other in others)
    return first


def edit(
    kind: str, name: str, change: Callable[[Place, torch.Tensor], torch.Tensor | None], *, step: int = 0, rank: int = -1
) -> Edit:
    """Return an edit of one tensor, on all ranks or on one."""

    def edited(place: Place, local: torch.Tensor) -> torch.Tensor | None:
        is_meant = (place.kind, place.name, place.step) == (kind, name, step) and rank in (-1, place.rank)
        return change(place, local) if is_meant else local

    return edited


def both(first: Edit, second: Edit) -> Edit:
    def edited(place: Place, local: torch.Tensor) -> torch.Tensor | None:
        changed = first(place, local)
        return changed if changed is None else second(place, changed)

    return edited


def times(factor: float) -> Callable[[Place, torch.Tensor], torch.Tensor]:
    return lambda place, local: factor * local


def plus(amount: float) -> Callable[[Place, torch.Tensor], torch.Tensor]:
    return lambda place, local: local + amount


def as_terms(place: Place, local: torch.Tensor) -> torch.Tensor:
    """Return what two TP ranks hold where nothing added up their terms."""
    term = torch.randn(local.shape, generator=torch.Generator().manual_seed(3), dtype=local.dtype)
    return term if place.tp_rank == 0 else local - term


def local_part(place: Place, whole: torch.Tensor, tp: int = 2) -> torch.Tensor:
    dim = WEIGHTS[place.name]
    return whole if dim is None else whole.chunk(tp, dim)[place.tp_rank]


# ---- right runs


@pytest.mark.parametrize("layouts", [True, False], ids=["known layouts", "unknown layouts"])
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_a_right_run_passes_at_any_topology(tp: int, dp: int, layouts: bool) -> None:
    report = compared(run(tp=tp, dp=dp, layouts=layouts))
    require_passed(report)
    assert report.verdict.coverage.compared > 60


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ({"tp": 2}, {"tp": 4}),
        ({"tp": 2, "dp": 2}, {"dp": 4}),
        ({"tp": 2, "layouts": False}, {"tp": 2, "layouts": False}),
        ({"tp": 2, "dp": 2, "same_batch": True}, {}),
        ({"tp": 2, "passes": 2}, {"passes": 4}),
        ({"tp": 2, "moments": True}, {"moments": True}),
    ],
    ids=[
        "two shards and four",
        "two shards of two replicas and four replicas",
        "two shards twice, of unknown layouts",
        "two replicas that both have the whole batch",
        "two micro-batches and four",
        "moments",
    ],
)
def test_two_right_runs_agree(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    require_passed(compared(run(**actual), run(rounding=1.0, seed=5, **expected)))


def test_outputs_may_be_terms_where_what_follows_is_right() -> None:
    require_passed(compared(run(tp=2, edit=edit("output", "layers.0.down", as_terms))))


def test_a_loss_that_is_scaled_elsewhere_is_no_mistake_where_parameters_gradients_agree() -> None:
    def scaled(place: Place, local: torch.Tensor) -> torch.Tensor:
        return 3 * local if place.kind == "output_gradient" else local

    report = compared(run(tp=2, edit=scaled))
    require_passed(report)
    assert any("all are 3 times" in reason for reason in report.verdict.coverage.not_compared.values())


def test_a_run_that_was_killed_is_compared_up_to_its_last_step() -> None:
    killed = tuple(replace(rank, is_complete=False, steps=rank.steps[:1], num_steps=1) for rank in run(tp=2))
    report = compared(killed)
    require_passed(report)
    assert report.verdict.coverage.not_compared["step 1"] == "the actual run has no such step"


def test_shards_in_another_order_are_no_mistake_where_what_follows_is_right() -> None:
    """A fused layer: each rank holds its part of the first half, then of the second."""

    def fused(place: Place, local: torch.Tensor) -> torch.Tensor:
        if (place.kind, place.name) != ("output", "layers.0.up"):
            return local
        return torch.cat([half.chunk(2, -1)[place.tp_rank] for half in place.whole.chunk(2, -1)], -1)

    report = compared(run(tp=2, edit=fused))
    require_passed(report)
    assert any("another order" in reason for reason in report.verdict.coverage.not_compared.values())
    after = edit("output", "layers.0.down", plus(0.1))
    assert the_finding(compared(run(tp=2, edit=both(fused, after)))).where["module"] == "layers.0.up"


def test_terms_of_a_gradient_that_are_known_to_be_some_are_added_up() -> None:
    def partial(rank: int, step: StepRecord) -> StepRecord:
        def as_term(record: TensorRecord) -> TensorRecord:
            is_meant = (record.kind, record.name) == ("gradient", NORM)
            readings = tuple(replace(reading, is_term=True) for reading in record.readings)
            return replace(record, readings=readings) if is_meant else record

        return replace(step, tensors=tuple(map(as_term, step.tensors)))

    def terms(place: Place, local: torch.Tensor) -> torch.Tensor:
        return as_terms(place, local) if (place.kind, place.name) == ("gradient", NORM) else local

    require_passed(compared(run(tp=2, edit=terms, change=partial)))


# ---- margins of modules


@pytest.mark.parametrize(
    ("kind", "name", "module", "phase"),
    [
        ("output", "layers.0.down", "layers.0.down", "forward"),
        ("output_gradient", "layers.0.norm", "layers.0.norm", "backward"),
        ("gradient", "layers.0.up.weight", "layers.0.up", "backward"),
        ("weight", "head.weight", "head", "weights"),
    ],
)
def test_the_margins_of_modules_show_where_the_runs_differ(kind: str, name: str, module: str, phase: str) -> None:
    right, wrong = (compared(run(tp=2, **each)) for each in ({}, {"edit": edit(kind, name, plus(0.1))}))
    margins = verdict_json(right.verdict)["margins"]
    assert set(margins) == {"forward", "backward", "weights"}
    assert all({"layers.0.down", "layers.0.norm", "head"} <= set(of_phase) for of_phase in margins.values())
    assert all(margin < 1 for of_phase in margins.values() for margin in of_phase.values())
    margins = verdict_json(wrong.verdict)["margins"]
    assert {(of, name) for of in margins for name, margin in margins[of].items() if margin > 1} == {(phase, module)}
    assert f"{module.rpartition('.')[2]} " in wrong.to_text().partition("  forward  backward  weights")[2]


# ---- outputs


def test_a_sum_that_is_never_reduced_is_found_where_it_should_have_been() -> None:
    after = both(edit("output", "layers.0", plus(1.0)), edit("output", "head", plus(1.0)))
    finding = the_finding(compared(run(tp=2, edit=both(edit("output", "layers.0.down", as_terms), after))))
    assert (finding.cause, finding.where["module"]) == ("missing_reduce", "layers.0.down")
    assert finding.evidence["followed_by"] == ["layers.0", "head"]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (times(2.0), "duplicate_reduce"),
        (times(0.5), "mean_instead_of_sum"),
        (times(0.0), "all_zero"),
        (times(float("nan")), "not_finite"),
        (plus(0.1), None),
    ],
)
def test_a_wrong_output_has_a_cause_only_where_it_is_shown(change: Any, cause: str | None) -> None:
    finding = the_finding(compared(run(tp=2, edit=edit("output", "layers.0.down", change))))
    assert (finding.check, finding.cause) == ("outputs_match_reference", cause)
    assert cause is not None or 'modules="layers.0.down*", tensors="full"' in finding.evidence["note"]


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (lambda place, whole, bias: as_terms(place, whole - bias) + bias, "missing_reduce"),
        (lambda place, whole, bias: whole + bias, "bias_added_per_rank"),
        (lambda place, whole, bias: 2 * (whole - bias) + bias, "duplicate_reduce"),
        (lambda place, whole, bias: (whole - bias) / 2 + bias, "mean_instead_of_sum"),
        (lambda place, whole, bias: whole + 2.2 * bias.flip(0), None),
        (lambda place, whole, bias: whole + 3 * bias, None),
    ],
)
def test_wrong_sums_are_told_by_the_bias_that_they_leave_in_every_row(wrong: Any, cause: str | None) -> None:
    def with_bias(place: Place, local: torch.Tensor) -> torch.Tensor:
        return wrong(place, local, bias()) if (place.kind, place.name) == ("output", "head") else local

    finding = the_finding(compared(run(tp=2, biases=("head",), edit=with_bias), run(rounding=1.0, biases=("head",))))
    assert (finding.where["module"], finding.cause) == ("head", cause)


def test_an_output_that_is_wrong_on_one_rank_names_it() -> None:
    finding = the_finding(compared(run(tp=2, edit=edit("output", "layers.0.up", plus(0.1), rank=1))))
    assert finding.where["ranks"] == [1]
    assert finding.evidence["differs_in_columns"] == "16 to 31 of 32"


# ---- gradients


def test_a_gradient_that_was_not_summed_over_tp_is_a_partial_gradient() -> None:
    finding = the_finding(compared(run(tp=2, edit=edit("gradient", NORM, as_terms))))
    assert (finding.cause, finding.where["parameter"]) == ("partial_gradient_on_replica", NORM)
    assert finding.where["ranks"] == [0, 1]


def test_a_gradient_that_was_summed_twice_over_tp_is_named() -> None:
    assert the_finding(compared(run(tp=2, edit=edit("gradient", NORM, times(2.0))))).cause == "duplicate_reduce"


@pytest.mark.parametrize(
    ("of_norms", "note"), [(2.0, "clipped, unscaled or divided"), (3.0, "")], ids=["one factor", "two factors"]
)
def test_gradients_of_shards_and_replicas_that_are_scaled_were_not_reduced_too_often(
    of_norms: float, note: str
) -> None:
    def scaled(place: Place, local: torch.Tensor) -> torch.Tensor:
        return local * (of_norms if "norm" in place.name else 2.0) if place.kind == "gradient" else local

    def with_noise(of_others: Edit | None = None) -> Edit:
        """Return an edit that leaves rounding alone of the gradient of the head."""

        def edited(place: Place, local: torch.Tensor) -> torch.Tensor | None:
            if (place.kind, place.name) == ("gradient", "head.weight"):
                return 1e-15 * local
            return local if of_others is None else of_others(place, local)

        return edited

    finding = the_finding(compared(run(tp=2, edit=with_noise(scaled)), run(rounding=1.0, edit=with_noise())))
    assert (finding.cause, finding.evidence["factors"]) == ("gradient_scaled", list(dict.fromkeys([2.0, of_norms])))
    assert [finding.where["parameter"], *finding.evidence["also"]] == [*WEIGHTS][:-1]
    assert note in finding.evidence["note"]


@pytest.mark.parametrize(
    ("tp", "width", "factor", "options"),
    [(3, 33, 1 / 3, {}), (2, WIDTH, 1.99998, {"noise_of_replays": 1e-4})],
    ids=["a factor that no decimal is", "a factor near that of a sum"],
)
def test_a_factor_is_that_of_shards_to_the_digits_that_are_known_of_it(
    tp: int, width: int, factor: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_made, "WIDTH", width)

    def scaled(place: Place, local: torch.Tensor) -> torch.Tensor:
        return factor * local if place.kind == "gradient" else local

    finding = the_finding(compared(run(tp=tp, edit=scaled, **options), run(rounding=1.0, **options)))
    assert (finding.cause, finding.evidence["factors"]) == ("gradient_scaled", [pytest.approx(factor, abs=1e-6)])
    assert [finding.where["parameter"], *finding.evidence["also"]] == [*WEIGHTS]


def test_a_model_that_is_left_in_another_mode_is_said_to_be() -> None:
    def in_evaluation(rank: int, step: StepRecord) -> StepRecord:
        return replace(step, passes=tuple(replace(call, is_training=False) for call in step.passes))

    actual = run(tp=2, change=in_evaluation, edit=edit("output", "layers.0.up", plus(0.1)))
    note = the_finding(compared(actual)).evidence["note"]
    assert note == "the actual run's model is in evaluation mode in this step, the expected run's in training mode"


def test_gradients_that_were_summed_over_replicas_are_named_together() -> None:
    def summed(place: Place, local: torch.Tensor) -> torch.Tensor:
        return 2 * local if place.kind == "gradient" else local

    finding = the_finding(compared(run(tp=2, dp=2, edit=summed)))
    assert finding.cause == "sum_instead_of_mean"
    assert [finding.where["parameter"], *finding.evidence["also"]] == list(WEIGHTS)


def test_gradients_of_replicas_that_were_not_averaged_lack_a_reduction() -> None:
    def own(place: Place, local: torch.Tensor) -> torch.Tensor:
        return local + (0.3 if place.dp_rank else -0.3)

    finding = the_finding(compared(run(tp=2, dp=2, edit=edit("gradient", DOWN, own))))
    assert (finding.cause, finding.evidence["reduced_over"]) == ("missing_reduce", "dp")


def test_a_gradient_that_one_rank_lacks_is_missing_there() -> None:
    finding = the_finding(compared(run(tp=2, edit=edit("gradient", UP, lambda place, local: None, rank=1))))
    assert (finding.cause, finding.where["parameter"], finding.where["ranks"]) == ("gradient_missing", UP, [1])


def test_a_gradient_times_a_constant_is_scaled() -> None:
    finding = the_finding(compared(run(tp=2, edit=edit("gradient", UP, times(1.7)))))
    assert (finding.cause, finding.evidence["factors"]) == ("gradient_scaled", [1.7])


@pytest.mark.parametrize(("name", "rank"), [(NORM, 1), (UP, 1), (DOWN, 0)], ids=["replica", "column", "row"])
@pytest.mark.parametrize("factor", [2.0, 0.5, 3.0])
def test_a_gradient_that_is_scaled_on_one_rank_alone_was_not_reduced_too_often(
    name: str, rank: int, factor: float
) -> None:
    finding = the_finding(compared(run(tp=2, edit=edit("gradient", name, times(factor), rank=rank))))
    assert (finding.cause, finding.where["ranks"]) == ("gradient_scaled", [rank])


def test_a_gradient_that_is_wrong_on_one_rank_names_it() -> None:
    finding = the_finding(compared(run(tp=2, edit=edit("gradient", UP, plus(0.1), rank=1))))
    assert (finding.cause, finding.where["ranks"]) == (None, [1])
    assert finding.evidence["differs_in_rows"] == "16 to 31 of 32"


# ---- micro-batches


def of_gradients(change: Callable[[Place, list[torch.Tensor]], torch.Tensor], passes: int, name: str = "") -> Edit:
    """Return an edit of gradients by those of the micro-batches."""

    def edited(place: Place, local: torch.Tensor) -> torch.Tensor:
        if place.kind not in ("gradient", "accumulated") or (name and place.name != name):
            return local
        return local_part(place, change(place, micro_batch_gradients(place.step, passes, place.name)))

    return edited


def reduced_again(place: Place, terms: list[torch.Tensor]) -> torch.Tensor:
    """Return the gradient of a hook that sums the accumulated gradient over two ranks at each micro-batch."""
    number = len(terms) if place.kind == "gradient" else int(place.part)
    reduced = terms[0]
    for term in terms[1:number]:
        reduced = 2 * reduced + term
    return reduced


def test_accumulated_gradients_that_were_reduced_again_are_named_by_what_either_run_kept() -> None:
    kept = run(tp=2, passes=3, accumulated=True, edit=of_gradients(reduced_again, 3, NORM))
    not_kept = run(tp=2, passes=3, edit=of_gradients(reduced_again, 3, NORM))
    for report in (compared(kept), compared(not_kept, unsharded_in_three_micro_batches())):
        finding = the_finding(report)
        assert (finding.cause, finding.where["parameter"]) == ("reduced_after_accumulation", NORM)
        assert "also" not in finding.evidence


def test_the_gradient_of_the_last_micro_batch_alone_is_named() -> None:
    actual = run(tp=2, passes=3, edit=of_gradients(lambda place, terms: terms[-1], 3))
    assert the_finding(compared(actual, unsharded_in_three_micro_batches())).cause == "last_micro_batch_only"


def test_a_cause_is_found_where_one_replica_alone_holds_a_gradient() -> None:
    last = of_gradients(lambda place, terms: terms[-1 if place.kind == "gradient" else 0], 2)

    def partitioned(place: Place, local: torch.Tensor) -> torch.Tensor | None:
        is_elsewhere = place.kind == "gradient" and place.dp_rank == (place.name == NORM)
        return None if is_elsewhere else last(place, local)

    actual = run(tp=2, dp=2, passes=2, accumulated=True, edit=partitioned)
    expected = run(rounding=1.0, seed=5, passes=2, accumulated=True)
    assert the_finding(compared(actual, expected)).cause == "last_micro_batch_only"


def of_cross_entropy(*, is_lost: bool) -> Edit:
    """Return an edit: a cut output gets the gradient of a cross entropy, (P - Y) / n, or -Y / n."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, WIDTH, (BATCH, LENGTH), generator=generator)
    right = logits.softmax(-1) * (not is_lost) - torch.nn.functional.one_hot(labels, WIDTH)

    def edited(place: Place, local: torch.Tensor) -> torch.Tensor:
        if (place.kind, place.name) != ("output_gradient", "layers.0.up"):
            return local
        return right.split(local.shape[-1], -1)[place.tp_rank] / (BATCH * LENGTH)

    return edited


def test_the_gradient_of_labels_alone_is_that_of_a_sum_without_backward() -> None:
    expected = run(edit=of_cross_entropy(is_lost=False))
    require_passed(compared(run(tp=2, edit=of_cross_entropy(is_lost=False)), expected))
    finding = the_finding(compared(run(tp=2, edit=of_cross_entropy(is_lost=True)), expected))
    assert finding.cause == "collective_without_backward"
    assert finding.evidence["labels"] == BATCH * LENGTH


@pytest.mark.parametrize("is_cut_inside", [True, False])
def test_own_terms_beside_a_residual_are_those_of_a_sum_without_backward(is_cut_inside: bool) -> None:
    """The block adds a branch to what it is given: what `down` gets is the block's gradient and the branch's."""
    name = "layers.0.down"

    def terms(place: Place, local: torch.Tensor) -> torch.Tensor:
        if (place.kind, place.name) != ("output_gradient", name):
            return local
        residual = wholes(place.step)["output_gradient", "layers.0"]
        branch = local - residual
        term = torch.randn(local.shape, generator=torch.Generator().manual_seed(3), dtype=local.dtype)
        return residual + (term if place.tp_rank == 0 else branch - term)

    rename = {"layers.0.up.weight": "layers.0.weight"} if is_cut_inside else {}
    names = {"rename": lambda name: rename.get(name, name)}
    finding = the_finding(compared(run(tp=2, edit=terms, **names), run(rounding=1.0, seed=5, **names)))
    assert finding.where["module"] == name
    assert finding.cause == ("collective_without_backward" if is_cut_inside else "missing_reduce")
    assert finding.evidence["beside_gradient_of"] == "layers.0"


def test_gradients_that_end_at_a_sum_are_those_of_a_sum_without_backward() -> None:
    def ended(place: Place, local: torch.Tensor) -> torch.Tensor | None:
        is_behind = place.kind == "gradient" and place.name in (UP, DOWN)
        return None if is_behind else local

    def ended_before(place: Place, local: torch.Tensor) -> torch.Tensor | None:
        return None if (place.kind, place.name) == ("output_gradient", "layers.0.up") else ended(place, local)

    finding = the_finding(compared(run(tp=2, edit=ended_before)))
    assert (finding.cause, finding.where["parameter"]) == ("collective_without_backward", DOWN)
    assert finding.evidence["also"] == [UP]
    frozen = the_finding(compared(run(tp=2, edit=ended)))
    assert (frozen.cause, frozen.evidence["also"]) == ("gradient_missing", [DOWN])
    first_sum = edit("gradient", "embed.weight", lambda place, local: None)

    def rootless(place: Place, local: torch.Tensor) -> torch.Tensor | None:
        return None if (place.kind, place.name) == ("output_gradient", "") else local

    nothing_before = compared(run(tp=2, edit=both(first_sum, rootless)), run(rounding=1.0, edit=rootless))
    assert the_finding(nothing_before).cause == "gradient_missing"
    one_rank = edit("gradient", DOWN, lambda place, local: None, rank=1)
    assert the_finding(compared(run(tp=2, edit=one_rank))).cause == "gradient_missing"


def test_terms_are_found_where_one_replica_alone_holds_a_gradient() -> None:
    def terms_on_one_replica(place: Place, local: torch.Tensor) -> torch.Tensor | None:
        if (place.kind, place.name) != ("gradient", NORM):
            return local
        return local * (0.3 if place.tp_rank else 0.7) if place.dp_rank else None

    finding = the_finding(compared(run(tp=2, dp=2, edit=terms_on_one_replica)))
    assert (finding.cause, finding.where["parameter"]) == ("partial_gradient_on_replica", NORM)


def test_what_each_replica_of_the_expected_run_accumulated_is_averaged() -> None:
    def own(place: Place, local: torch.Tensor) -> torch.Tensor:
        return local + (0.3 if place.dp_rank else -0.3) if place.kind == "accumulated" else local

    expected = run(tp=2, dp=2, passes=2, accumulated=True, edit=own)
    actual = run(tp=2, passes=2, edit=of_gradients(lambda place, terms: terms[-1], 2))
    assert the_finding(compared(actual, expected)).cause == "last_micro_batch_only"


def test_micro_batches_weighted_alike_have_the_mean_of_local_means() -> None:
    shares = (0.5, 0.3, 0.2)

    def weighted(place: Place, terms: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([term / (3 * share) for term, share in zip(terms, shares, strict=True)]).sum(0)

    actual = run(tp=2, passes=3, edit=of_gradients(weighted, 3))
    finding = the_finding(compared(actual, unsharded_in_three_micro_batches()))
    assert finding.cause == "mean_of_local_means"
    assert finding.evidence["share_of_tokens"] == pytest.approx(shares)


def test_replicas_weighted_alike_have_the_mean_of_local_means() -> None:
    def own_mean(place: Place, local: torch.Tensor) -> torch.Tensor:
        is_of_samples = place.kind == "output_gradient" and bool(place.name)
        return local / 2 / (0.3, 0.7)[place.dp_rank] if is_of_samples else local

    finding = the_finding(compared(run(tp=2, dp=2, edit=own_mean)))
    assert (finding.cause, finding.where["module"]) == ("mean_of_local_means", "head")
    assert finding.evidence["share_of_tokens"] == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize("over", ["dp", "tp"])
def test_a_micro_batch_that_was_not_reduced_is_named(over: str) -> None:
    def unreduced_first(place: Place, terms: list[torch.Tensor]) -> torch.Tensor:
        rank = place.dp_rank if over == "dp" else place.tp_rank
        own = terms[0] + (0.3 if rank else -0.3) if over == "dp" else terms[0] * (0.3 if rank else 0.7)
        return own + terms[1] if place.kind == "gradient" else own

    name = DOWN if over == "dp" else NORM
    actual = run(
        tp=2, dp=2 if over == "dp" else 1, passes=2, accumulated=True, edit=of_gradients(unreduced_first, 2, name)
    )
    finding = the_finding(compared(actual))
    assert finding.cause == "micro_batch_unreduced"
    assert (finding.evidence["micro_batches"], finding.evidence["reduced_over"]) == ([0], over)


# ---- norms


def norms_of_ranks(step: int = 0) -> list[float]:
    """Return the norm of the gradients that each of two TP ranks holds."""
    gradients = {name: wholes(step)["gradient", name] for name in WEIGHTS}
    parts = [
        [whole if WEIGHTS[name] is None else whole.chunk(2, WEIGHTS[name])[rank] for name, whole in gradients.items()]
        for rank in (0, 1)
    ]
    return [hypot(*(float(part.norm()) for part in of_rank)) for of_rank in parts]


def whole_norm(step: int = 0) -> float:
    return hypot(*(float(wholes(step)["gradient", name].norm()) for name in WEIGHTS))


def clipped_by(norm_of: Callable[[Place], float]) -> Edit:
    def edited(place: Place, local: torch.Tensor) -> torch.Tensor:
        return local / norm_of(place) if place.kind == "gradient" else local

    return edited


WRONG_NORMS: Mapping[str, Callable[[list[float], int], float]] = {
    "norm_is_local": lambda norms, tp_rank: norms[tp_rank],
    "norm_counts_replicas": lambda norms, tp_rank: hypot(*norms),
    "norm_leaves_out_shards": lambda norms, tp_rank: norms[0],
    "norm_averaged_over_ranks": lambda norms, tp_rank: sum(norms) / 2,
    "norm_summed_over_ranks": lambda norms, tp_rank: sum(norms),
}


@pytest.mark.parametrize("cause", WRONG_NORMS)
def test_clipping_by_a_wrong_norm_is_named(cause: str) -> None:
    used = WRONG_NORMS[cause]
    expected = run(rounding=1.0, edit=clipped_by(lambda place: whole_norm(place.step)))
    actual = run(tp=2, edit=clipped_by(lambda place: used(norms_of_ranks(place.step), place.tp_rank)))
    report = compared(actual, expected)
    assert {finding.check for finding in report.findings if finding.cause == cause} == {
        "gradients_match_reference",
        "gradient_norm_matches_reference",
    }


@pytest.mark.parametrize(
    ("factor", "norm", "cause"),
    [
        (1024.0, None, "gradient_scaled"),
        (2.0, None, "gradient_scaled"),  # as a norm would that was summed over two ranks
        (1024.0, 3.0, "norm_before_unscaling"),
    ],
    ids=["unscaled twice", "halved", "the run says that it clipped"],
)
def test_one_round_factor_is_that_of_a_norm_only_where_gradients_were_clipped(
    factor: float, norm: float | None, cause: str
) -> None:
    told = None if norm is None else lambda rank, gradients: norm * whole_norm()
    scaled = clipped_by(lambda place: factor)
    report = compared(run(tp=2, steps=1, edit=scaled), run(rounding=1.0, steps=1, reported_norm=told))
    assert next(each.cause for each in report.findings if each.check == "gradients_match_reference") == cause


def test_clipping_by_the_norm_of_all_gradients_passes() -> None:
    by_norm = clipped_by(lambda place: whole_norm(place.step))
    require_passed(compared(run(tp=2, edit=by_norm), run(rounding=1.0, edit=by_norm)))


@pytest.mark.parametrize("cause", WRONG_NORMS)
def test_a_norm_that_the_engine_tells_is_compared_with_that_of_all_gradients(cause: str) -> None:
    reported = WRONG_NORMS[cause]
    expected = run(rounding=1.0, steps=1, reported_norm=lambda rank, gradients: whole_norm())
    actual = run(tp=2, steps=1, reported_norm=lambda rank, gradients: reported(norms_of_ranks(), rank))
    finding = the_finding(compared(actual, expected))
    assert (finding.check, finding.cause) == ("gradient_norm_matches_reference", cause)


def test_a_norm_smaller_than_that_of_the_gradients_is_wrong_whatever_the_other_run_tells() -> None:
    actual = run(tp=2, steps=1, reported_norm=lambda rank, gradients: norms_of_ranks()[rank])
    assert the_finding(compared(actual)).cause == "norm_is_local"


# ---- the start


def test_weights_that_differ_at_the_start_are_found_before_any_step() -> None:
    report = compared(run(tp=2, edit=edit("weight", UP, times(1.0001), step=-1)))
    finding = the_finding(report)
    assert (finding.check, finding.where["parameter"]) == ("weights_match_reference", UP)
    assert "step 0" in report.verdict.coverage.not_compared


def test_one_ranks_shard_on_all_ranks_is_named() -> None:
    repeated = edit("weight", DOWN, lambda place, local: place.whole.chunk(2, 1)[0], step=-1)
    assert the_finding(compared(run(tp=2, edit=repeated))).cause == "shard_repeated"


def test_shards_on_each_others_ranks_are_named() -> None:
    swapped = edit("weight", DOWN, lambda place, local: place.whole.chunk(2, 1)[1 - place.tp_rank], step=-1)
    finding = the_finding(compared(run(tp=2, edit=swapped), run(tp=2)))
    assert (finding.cause, finding.evidence["rank_holds_shard_of"]) == ("shard_order_swapped", {"0": 1, "1": 0})


# ---- recordings that begin in the middle of a training, or leave steps out

IN_THE_MIDDLE: dict[str, Any] = {"tp": 2, "moments": True, "initial_moments": True}


def of_weights(factor: float) -> Edit:
    return lambda place, local: factor * local if place.kind == "weight" else local


def test_a_weight_that_a_resumed_run_has_not_loaded_is_found_before_any_step() -> None:
    expected = run(rounding=1.0, **{**IN_THE_MIDDLE, "tp": 1})
    finding = the_finding(compared(run(edit=edit("weight", UP, times(-0.5), step=-1), **IN_THE_MIDDLE), expected))
    assert (finding.check, finding.where["parameter"]) == ("weights_match_reference", UP)
    require_passed(compared(run(edit=of_weights(1 + 1e-9), **IN_THE_MIDDLE), expected))


@pytest.mark.parametrize("is_trained", [True, False], ids=["with a gradient", "without one"])
def test_a_bias_that_a_resumed_run_has_not_loaded_is_found_where_it_has_a_gradient(is_trained: bool) -> None:
    options: dict[str, Any] = {**IN_THE_MIDDLE, "biases": ("layers.0.down",), "trains_biases": is_trained}
    name = "layers.0.down.bias"
    report = compared(
        run(edit=edit("weight", name, times(0.0), step=-1), **options), run(rounding=1.0, **{**options, "tp": 1})
    )
    if is_trained:
        finding = the_finding(report)
        assert (finding.check, finding.where["parameter"]) == ("weights_match_reference", name)
    else:
        require_passed(report)


def test_weights_that_were_far_apart_before_the_recording_are_not_passed() -> None:
    report = compared(run(edit=of_weights(1.05), **IN_THE_MIDDLE), run(rounding=1.0, **{**IN_THE_MIDDLE, "tp": 1}))
    assert report.verdict.verdict == "skipped"
    assert "head.weight is 5.2% apart" in str(report.verdict.message)


@pytest.mark.parametrize("beyond", [0.0, 1e-8], ids=["as far as its bias", "further than its bias"])
def test_an_output_may_be_off_by_a_bias_that_is_given(beyond: float) -> None:
    options: dict[str, Any] = {**IN_THE_MIDDLE, "biases": ("layers.0.down",)}
    apart = both(
        edit("weight", "layers.0.down.bias", plus(1e-9), step=-1),
        edit("output", "layers.0.down", plus(1e-9 + beyond)),
    )
    report = compared(run(edit=apart, **options), run(rounding=1.0, **{**options, "tp": 1}))
    if not beyond:
        require_passed(report)
    else:
        assert the_finding(report).where["module"] == "layers.0.down"


def test_what_unrecorded_steps_before_the_first_one_add_up_to_is_given() -> None:
    def without_step_0(rank: int, step: StepRecord) -> StepRecord | None:
        return None if step.number == 0 else step

    options: dict[str, Any] = {"steps": 2, "change": without_step_0}
    apart = of_weights(1 + 1e-10)
    actual = run(tp=2, edit=lambda place, local: local if place.step < 0 else apart(place, local), **options)
    require_passed(compared(actual, run(rounding=1.0, **options)))


def test_weights_that_part_in_a_step_that_was_not_recorded_are_found_where_rounding_has_not_moved_them() -> None:
    def without_step_1(rank: int, step: StepRecord) -> StepRecord | None:
        return None if step.number == 1 else step

    options: dict[str, Any] = {"steps": 3, "change": without_step_1}
    expected = run(rounding=1.0, **options)
    finding = the_finding(compared(run(tp=2, edit=edit("weight", NORM, times(1.1), step=2), **options), expected))
    assert (finding.check, finding.where["parameter"], finding.where["step"]) == (
        "updates_match_reference",
        NORM,
        2,
    )
    assert "steps=range(1, 3)" in finding.evidence["note"]


# ---- updates


def with_steps(change: Callable[[int, StepRecord], StepRecord | None]) -> Traces:
    return run(tp=2, change=change)


@pytest.mark.parametrize(
    ("change", "ranks", "step"),
    [
        (lambda rank, step: replace(step, has_update=False) if step.number == 0 else None, [0, 1], 0),
        (lambda rank, step: step if step.number == 0 else replace(step, has_update=False), [0, 1], 1),
        (
            lambda rank, step: step if rank == 0 else replace(step, has_update=False) if not step.number else None,
            [1],
            0,
        ),
    ],
    ids=["never", "not the last one", "one rank never"],
)
def test_a_step_that_was_not_taken_leaves_weights_stale(change: Any, ranks: list[int], step: int) -> None:
    finding = the_finding(compared(with_steps(change)))
    assert (finding.check, finding.cause) == ("updates_match_reference", "stale_weight")
    assert (finding.where["ranks"], finding.where["step"]) == (ranks, step)
    assert [finding.where["parameter"], *finding.evidence["also"]] == list(WEIGHTS)


def test_weights_that_one_rank_did_not_update_are_stale_there() -> None:
    before: dict[tuple[int, str], torch.Tensor] = {}

    def stale(place: Place, local: torch.Tensor) -> torch.Tensor:
        if place.kind == "weight" and place.rank == 1:
            return before.setdefault((place.rank, place.name), local)
        return local

    finding = the_finding(compared(run(tp=2, edit=stale)))
    assert (finding.cause, finding.where["ranks"], finding.evidence["first_of"]) == ("stale_weight", [1], 5)


@pytest.mark.parametrize(("last_bits", "is_stale"), [(1, False), (1e6, True)])
def test_a_step_of_the_last_bits_may_round_to_nothing_in_the_other_run(last_bits: float, is_stale: bool) -> None:
    """As where the gradient of a bias of keys is its rounding."""

    def stays(moves: float) -> Edit:
        def edited(place: Place, local: torch.Tensor) -> torch.Tensor:
            if (place.kind, place.name) != ("weight", NORM) or place.step < 0:
                return local
            weight = initial_weights()[NORM]
            weight[0] *= 1 + moves * torch.finfo(weight.dtype).eps
            return weight

        return edited

    report = compared(run(tp=2, edit=stays(0.0)), run(rounding=1.0, seed=5, edit=stays(last_bits)))
    assert [finding.cause for finding in report.findings if finding.where.get("parameter") == NORM][:1] == (
        ["stale_weight"] if is_stale else []
    )


def test_another_learning_rate_is_in_the_finding() -> None:
    finding = the_finding(compared(run(tp=2, rates=(0.101,) * 2)))
    assert (finding.check, finding.cause) == ("updates_match_reference", "options_differ")
    assert (finding.evidence["lr_actual"], finding.evidence["lr_expected"]) == (0.101, 0.1)
    assert finding.evidence["update_ratio"] == pytest.approx(1.01, rel=1e-4)


def test_an_optimizer_of_matrices_on_shards_is_named() -> None:
    for optimizer, cause in (("Muon", "optimizer_sees_one_shard"), ("SGD", None)):
        actual = run(tp=2, optimizer=optimizer, edit=edit("weight", UP, plus(0.01)))
        assert the_finding(compared(actual)).cause == cause


def test_a_replica_that_drifts_is_named_with_its_weight() -> None:
    report = compared(run(tp=2, edit=edit("weight", NORM, plus(0.01), rank=1)))
    assert [(finding.check, finding.cause) for finding in report.findings] == [
        ("updates_match_reference", "replica_drift"),
        ("replicas_agree", None),
    ]
    assert report.findings[1].evidence["follows_from"] == "updates_match_reference"


def test_replicas_that_drift_beside_a_finding_are_named_alone() -> None:
    drift = edit("state", NORM, times(1 + 1e-15), rank=1)  # bits, and no more than rounding
    wrong = edit("gradient", UP, plus(0.1))
    moments = {"moments": True}
    report = compared(run(tp=2, edit=both(wrong, drift), **moments), run(rounding=1.0, seed=5, **moments))
    last = report.findings[-1]
    assert (last.check, last.cause, last.where["parameter"]) == ("replicas_agree", "replica_drift", NORM)


def test_what_follows_names_each_parameter_once_and_advises_nothing() -> None:
    def drift(place: Place, local: torch.Tensor) -> torch.Tensor:
        is_meant = place.kind in ("weight", "state", "master") and place.step == 0 and place.rank == 1
        return local + 0.01 if is_meant and "norm" not in place.name else local

    options = {"moments": True, "masters": True, "dp": 2}
    report = compared(run(edit=drift, **options), run(rounding=1.0, seed=5, **options))
    for finding in report.findings:
        also = [entry if isinstance(entry, str) else entry["name"] for entry in finding.evidence.get("also", ())]
        assert len({*also}) == len(also)
    wrong = both(edit("output", "layers.0.down", plus(0.1)), edit("gradient", UP, plus(0.1)))
    report = compared(run(tp=2, edit=wrong))
    assert len(report.findings) > 1
    assert ['tensors="full"' in str(finding.evidence.get("note")) for finding in report.findings] == [
        number == 0 for number in range(len(report.findings))
    ]


def test_a_norm_that_nothing_reports_is_one_line() -> None:
    lines = compared(run(tp=2, steps=2)).verdict.coverage.not_compared
    assert [name for name in lines if "norm" in name.partition(":")[0]] == [
        "gradient_norm_matches_reference: gradient norm"
    ]


def fused_by_blocks(place: Place, local: torch.Tensor) -> torch.Tensor:
    """Return each rank's part of a layer whose two halves are cut one by one."""
    if "up" not in place.name or place.kind == "state":
        return local
    dim = -1 if "output" in place.kind else 0
    whole = place.whole
    return torch.cat([half.chunk(2, dim)[place.tp_rank] for half in whole.chunk(2, dim)], dim)


def test_weights_cut_block_by_block_are_no_mistake_where_outputs_are_right() -> None:
    report = compared(run(tp=2, layouts=False, edit=fused_by_blocks))
    require_passed(report)
    assert any("a fused layer" in reason for reason in report.verdict.coverage.not_compared.values())


def test_weights_in_another_order_are_a_mistake_where_the_output_of_their_module_is_wrong() -> None:
    wrong = both(fused_by_blocks, edit("output", "layers.0.up", plus(0.1)))
    first = compared(run(tp=2, layouts=False, edit=wrong)).findings[0]
    assert (first.check, first.where["parameter"]) == ("weights_match_reference", UP)
    later = both(fused_by_blocks, edit("output", "layers.0", plus(0.1)))
    finding = the_finding(compared(run(tp=2, layouts=False, edit=later)))
    assert finding.where["module"] == "layers.0"


def test_what_a_run_could_not_record_is_in_the_coverage() -> None:
    reason = "its passes cannot be repeated"
    traces = tuple(replace(rank, not_recorded={"replays": reason, "state of x": "gone"}) for rank in run(tp=2))
    not_compared = compared(traces).verdict.coverage.not_compared
    assert not_compared["state of x of actual"] == "gone"
    assert "replays of actual" not in not_compared  # the other run has some
    assert compared(traces, traces).verdict.coverage.not_compared["replays of actual"] == reason


def test_moments_of_another_rank_are_named_before_the_step() -> None:
    repeated = edit("state", UP, lambda place, local: place.whole.chunk(2, 0)[0], step=-1)
    moments = {"moments": True, "initial_moments": True}
    finding = the_finding(compared(run(tp=2, edit=repeated, **moments), run(rounding=1.0, **moments)))
    assert (finding.check, finding.cause) == ("optimizer_state_matches_reference", "optimizer_state_of_another_rank")
    assert (finding.where["parameter"], finding.where["ranks"]) == (UP, [1])


def test_moments_of_another_rank_are_named_after_a_step_in_the_middle() -> None:
    repeated = edit("state", UP, lambda place, local: place.whole.chunk(2, 0)[0], step=1)
    finding = the_finding(compared(run(tp=2, edit=repeated, moments=True), run(rounding=1.0, moments=True)))
    assert (finding.check, finding.cause) == ("optimizer_state_matches_reference", "optimizer_state_of_another_rank")
    assert (finding.where["parameter"], finding.where["step"]) == (UP, 1)


def test_moments_that_were_those_of_another_rank_as_the_step_began_are_named() -> None:
    left: dict[int, str] = {}

    def taken(rank: int, step: StepRecord) -> StepRecord:
        """Rank 1 is given what rank 0 had after the step before."""
        [state] = [each for each in step.tensors if (each.kind, each.name) == ("state", UP)]
        if step.number == 0:
            left[rank] = state.digest
        given = replace(state, digest_before=left[0] if (rank, step.number) == (1, 1) else "")
        return replace(step, tensors=tuple(given if each is state else each for each in step.tensors))

    wrong = edit("state", UP, lambda place, local: local + 0.1 if place.rank == 1 else local, step=1)
    finding = the_finding(compared(run(tp=2, edit=wrong, change=taken, moments=True), run(rounding=1.0, moments=True)))
    assert (finding.check, finding.cause) == ("optimizer_state_matches_reference", "optimizer_state_of_another_rank")
    assert (finding.where["parameter"], finding.where["ranks"]) == (UP, [1])
    assert finding.evidence["state_of_rank"] == {"1": 0}


def test_moments_of_the_step_before_are_stale_and_zeros_are_named() -> None:
    before: dict[tuple[int, str], torch.Tensor] = {}

    def stale(place: Place, local: torch.Tensor) -> torch.Tensor:
        if (place.kind, place.name) != ("state", UP):
            return local
        return (
            local if place.step == 0 and before.setdefault((place.rank, UP), local) is local else before[place.rank, UP]
        )

    for change, cause in ((stale, "stale_weight"), (edit("state", UP, times(0.0), step=1), "all_zero")):
        finding = the_finding(compared(run(tp=2, edit=change, moments=True), run(rounding=1.0, moments=True)))
        assert (finding.check, finding.cause) == ("optimizer_state_matches_reference", cause)
        assert (finding.where["parameter"], finding.where["step"]) == (UP, 1)


def test_a_moment_that_was_zero_before_its_step_is_worked_out_from_the_decay() -> None:
    torch.manual_seed(0)
    before, gradient = (torch.randn(32, 32, dtype=torch.float64) for _ in range(2))
    after = 0.9 * before + 0.1 * gradient
    sketches = [sketch(tensor) for tensor in (0.1 * gradient, after, before)]
    found = stale_or_lost("exp_avg", *sketches, (0.9, 0.999))
    assert found is not None
    assert found.cause is Cause.OPTIMIZER_STATE_LOST
    assert stale_or_lost("exp_avg", *sketches, (0.5, 0.999)) is None
    assert stale_or_lost("exp_avg", sketch(after + 0.1), *sketches[1:], (0.9,)) is None


@pytest.mark.parametrize("by", [1.1, 1 + 3e-7], ids=["far", "by more than rounding"])
def test_masters_that_are_not_the_weights_are_stale(by: float) -> None:
    def older(place: Place, local: torch.Tensor) -> torch.Tensor:
        return local * by if place.kind == "master" and place.step < 0 else local

    finding = the_finding(compared(run(tp=2, masters=True, edit=older), run(rounding=1.0, masters=True)))
    assert (finding.check, finding.cause) == ("optimizer_state_matches_reference", "masters_stale")


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 1.0), ("float16", 1.0), ("float16", 1e-6)])
def test_weights_that_are_their_masters_rounded_are_not_stale(dtype: str, size: float) -> None:
    """Also where float16 has no smaller numbers than about their size."""
    generator = torch.Generator().manual_seed(0)
    master = size * torch.randn(64, 64, generator=generator)
    weight = master.to(getattr(torch, dtype))

    def record(kind: str, values: torch.Tensor) -> dict[int, TensorRecord]:
        reading = Reading("layout", (64, 64), "all", sketch(values))
        name = str(values.dtype).removeprefix("torch.")
        return {0: TensorRecord(kind, "up", "", 0, name, (64, 64), "", (reading,))}

    def found(values: torch.Tensor) -> object:
        table = {("weight", "up", "", 0): record("weight", weight), ("master", "up", "", 0): record("master", values)}
        return stale_masters(table, "up", "layout")

    assert found(master) is None
    assert found(1.1 * master) is not None


def test_masters_that_a_step_leaves_apart_from_the_weights_are_stale_in_that_step() -> None:
    def older(place: Place, local: torch.Tensor) -> torch.Tensor:
        return local * 1.1 if (place.kind, place.step, place.name) == ("master", 0, UP) else local

    expected = run(rounding=1.0, masters=True)
    clean = compared(run(tp=2, masters=True), expected)
    assert clean.passed, clean.to_text()
    without = run(rounding=1.0)
    for reference in (expected, without):
        finding = the_finding(compared(run(tp=2, masters=True, edit=older), reference))
        assert finding.check == "optimizer_state_matches_reference"
        assert (finding.where["parameter"], finding.where["step"]) == (UP, 0)
    assert finding.cause == "masters_stale"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_master_of_one_replica_is_not_told_as_stale_on_all(rank: int) -> None:
    def older(place: Place, local: torch.Tensor) -> torch.Tensor:
        return local * 1.03 if (place.kind, place.step, place.name) == ("master", 0, UP) else local

    def of_rank(place: Place, local: torch.Tensor) -> torch.Tensor:
        return older(place, local) if place.rank == rank else local

    report = compared(run(dp=2, masters=True, edit=of_rank), run(rounding=1.0))
    assert [(each.check, each.cause) for each in report.findings] == [("replicas_agree", "replica_drift")]


def test_a_gradient_that_is_infinite_in_the_expected_run_alone_is_said_to_be() -> None:
    def overflowing(place: Place, local: torch.Tensor) -> torch.Tensor:
        return local * inf if (place.kind, place.step, place.name) == ("gradient", 0, UP) else local

    finding = the_finding(compared(run(tp=2), run(rounding=1.0, edit=overflowing)))
    assert "elements of the expected run's are not finite; 0 of the actual run's" in finding.evidence["note"]


# ---- what cannot be compared


def test_calls_that_no_step_followed_on_either_side_do_not_undo_the_verdict() -> None:
    def left_over(rank: int, step: StepRecord) -> StepRecord:
        if step.number == 0:
            return step
        tensors = tuple(
            replace(record, readings=tuple(replace(reading, deviation=None) for reading in record.readings))
            for record in step.tensors
            if record.kind == "output"
        )
        return replace(step, has_update=False, tensors=tensors)

    report = compared(run(tp=2, change=left_over), run(rounding=1.0, change=left_over))
    require_passed(report)
    assert any("no optimizer step followed" in reason for reason in report.verdict.coverage.not_compared.values())


def test_runs_on_other_samples_are_not_compared() -> None:
    report = compared(run(tp=2, batch_seed=9))
    assert report.verdict.verdict == "skipped"
    assert "different samples" in str(report.verdict.message)


def test_runs_without_a_common_name_are_not_compared() -> None:
    actual = run(tp=2, rename=lambda name: f"net.{name}" if name else "")
    assert "--map" in str(compared(actual).verdict.message)
    require_passed(compared(actual, names=NameMap.of({"^net[.]": ""})))


def test_a_replica_whose_trace_is_missing_is_in_the_coverage() -> None:
    actual = tuple(rank for rank in run(tp=2, dp=2, same_batch=True) if rank.rank != 3)
    report = compared(actual)
    require_passed(report)
    assert "ranks 3 of actual" in report.verdict.coverage.not_compared


def test_only_the_replica_that_has_the_samples_of_the_other_run_is_compared() -> None:
    one, other = run(dp=2, same_batch=True), run(dp=2, same_batch=True, batch_seed=3)
    mixed = (one[0], replace(other[1], initial=one[1].initial))
    report = compared(mixed)
    require_passed(report)
    assert any("only replica 0" in reason for reason in report.verdict.coverage.not_compared.values())
    assert not any(check.check == "updates_match_reference" and check.compared for check in report.verdict.checks)


# ---- without replays


def test_nothing_is_claimed_without_replays() -> None:
    report = compared(run(tp=2, replays=0), run(rounding=1.0, replays=0))
    assert report.verdict.verdict == "skipped"
    assert "replays=2" in str(report.verdict.message)


def test_runs_that_are_equal_to_the_bit_pass_without_replays() -> None:
    require_passed(compared(run(tp=2, replays=0), run(tp=2, replays=0)))


def test_other_options_are_found_without_replays() -> None:
    finding = the_finding(compared(run(tp=2, replays=0, rates=(0.101,) * 2), run(replays=0)))
    assert (finding.cause, finding.evidence["lr_actual"]) == ("options_differ", 0.101)


# ---- two runs alike


@pytest.mark.parametrize("replays", [0, 2])
def test_two_runs_alike_that_part_are_nondeterministic(replays: int) -> None:
    actual = run(tp=2, replays=replays, edit=edit("output", "layers.0.up", plus(1e-3)))
    finding = the_finding(compared(actual, run(tp=2, replays=replays)))
    assert (finding.cause, finding.where["module"]) == ("nondeterminism", "layers.0.up")


def test_two_runs_alike_that_part_by_rounding_pass_and_say_so() -> None:
    report = compared(run(tp=2, rounding=1.0), run(tp=2))
    require_passed(report)
    assert "embed is not deterministic" in str(report.verdict.message)


@pytest.mark.parametrize(
    "options", [{"generators": "actual"}, {"passes": 2}], ids=["of another state", "for a half of the samples each"]
)
def test_other_random_numbers_are_no_mistake(options: dict[str, Any]) -> None:
    actual = run(tp=2, steps=2, draws=True, edit=edit("output", "layers.0.up", plus(0.1), step=1), **options)
    report = compared(actual, run(rounding=1.0, draws=True))
    require_passed(report)
    assert any("random numbers" in reason for reason in report.verdict.coverage.not_compared.values())


@pytest.mark.parametrize(
    ("options", "expected_options"),
    [
        ({"generators": "actual"}, {}),
        ({"draws": True}, {"draws": True}),
        ({"draws": True}, {"generators": "expected"}),
    ],
    ids=["nobody draws", "both draw the same", "one alone draws"],
)
def test_random_numbers_that_are_not_others_excuse_nothing(
    options: dict[str, Any], expected_options: dict[str, Any]
) -> None:
    actual = run(tp=2, steps=2, edit=edit("output", "layers.0.up", plus(0.1), step=1), **options)
    finding = the_finding(compared(actual, run(rounding=1.0, **expected_options)))
    assert (finding.check, finding.where["module"]) == ("outputs_match_reference", "layers.0.up")


def test_a_trace_without_states_of_generators_after_a_call_excuses_nothing() -> None:
    def not_looked(rank: int, step: StepRecord) -> StepRecord:
        return replace(step, passes=tuple(replace(call, generators_after={}) for call in step.passes))

    options: dict[str, Any] = {"draws": True, "change": not_looked}
    actual = run(tp=2, generators="actual", edit=edit("output", "layers.0.up", plus(0.1)), **options)
    assert the_finding(compared(actual, run(rounding=1.0, **options))).where["module"] == "layers.0.up"


# ---- low precision


def test_a_module_in_low_precision_is_judged_by_what_it_adds() -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "noise_of_replays": 0.02}
    expected = run(rounding=1.0, seed=5, **options)
    require_passed(compared(run(tp=2, rounding=1.0, seed=9, **options), expected))
    off = edit("output", "layers.0.down", times(1.08))
    finding = the_finding(compared(run(tp=2, rounding=1.0, seed=9, edit=off, **options), expected))
    assert finding.where["module"] == "layers.0.down"
    assert finding.margin > 1


def test_tokens_that_rounding_sends_to_other_experts_are_no_mistake_where_what_follows_is_right() -> None:
    names = {"layers.0.up": "layers.0.gate", "layers.0.up.weight": "layers.0.gate.weight"}
    plain: dict[str, Any] = {"dtype": torch.bfloat16, "noise_of_replays": 0.005, "steps": 1}
    options = {**plain, "rename": lambda name: names.get(name, name)}

    def rerouted(place: Place, local: torch.Tensor) -> torch.Tensor:
        if (place.kind, place.name) == ("output", "layers.0.down"):
            return local + 2.0 * (torch.arange(BATCH * LENGTH) == 5).reshape(BATCH, LENGTH, 1).to(local.dtype)
        return local + 0.1 if (place.kind, place.name) == ("gradient", DOWN) else local

    report = compared(run(tp=2, edit=rerouted, **options), run(**options))
    require_passed(report)
    told = [name for name, why in report.verdict.coverage.not_compared.items() if "other experts" in why]
    assert [name.rpartition(": ")[2] for name in told] == ["output of layers.0.down 0"[:-2], f"gradient of {DOWN}"]
    followed = both(rerouted, edit("output", "layers.0", plus(0.1)))
    assert the_finding(compared(run(tp=2, edit=followed, **options), run(**options))).where["module"] == "layers.0.down"
    assert the_finding(compared(run(tp=2, edit=rerouted, **plain), run(**plain))).where["module"] == "layers.0.down"
    exact = {**options, "dtype": torch.float32}
    assert the_finding(compared(run(tp=2, edit=rerouted, **exact), run(**exact))).where["module"] == "layers.0.down"


def test_a_step_that_rounds_to_nothing_in_low_precision_is_not_stale() -> None:
    def unmoved(place: Place, local: torch.Tensor) -> torch.Tensor:
        is_norm = (place.kind, place.name) == ("weight", NORM)
        return initial_weights(torch.bfloat16)[NORM] if is_norm else local

    options: dict[str, Any] = {"noise_of_replays": 0.1, "rates": (1e-4,) * 2}
    expected = run(dtype=torch.float32, rates=options["rates"])
    require_passed(compared(run(tp=2, dtype=torch.bfloat16, edit=unmoved, **options), expected))


def test_noise_that_grows_alike_over_modules_in_low_precision_passes() -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "noise_of_replays": 0.02}
    sizes = {name: 0.01 * 1.2**number for number, name in enumerate(OUTPUTS)}

    def noisy(place: Place, local: torch.Tensor) -> torch.Tensor:
        if place.kind != "output" or not place.name:
            return local
        generator = torch.Generator().manual_seed(len(place.name))
        return local + sizes[place.name] * torch.randn(local.shape, generator=generator).to(local.dtype)

    require_passed(compared(run(tp=2, edit=noisy, **options), run(**options)))


# ---- the picture


def test_what_is_given_is_not_drawn_as_wrong() -> None:
    def without_step_1(rank: int, step: StepRecord) -> StepRecord | None:
        return None if step.number == 1 else step

    options: dict[str, Any] = {"steps": 3, "change": without_step_1}
    actual = run(edit=edit("weight", NORM, times(1.005), step=2), **options)
    report = compared(actual, run(rounding=1.0, seed=5, **options))
    require_passed(report)
    assert report.picture is not None
    [point] = [each for each in report.picture.points if (each.step, each.label) == (2, NORM)]
    assert point.relative_error > 0.004
    assert not point.is_wrong


def test_the_picture_has_a_point_for_each_tensor_and_the_tiles_of_the_worst() -> None:
    picture = compared(run(tp=2, edit=edit("gradient", UP, plus(0.1), rank=1))).picture
    assert picture is not None
    assert {point.phase for point in picture.points} == {"start", "forward", "backward", "gradient", "update"}
    wrong = [point for point in picture.points if point.is_wrong and point.phase == "gradient"]
    assert [point.name for point in wrong] == [UP]
    worst = next(each for each in picture.tile_maps if each.label == f"gradient of {UP}")
    assert [(shard.ranks, shard.first_row, shard.last_row) for shard in worst.shards] == [((0,), 0, 7), ((1,), 8, 15)]
    assert max(worst.relative_errors[0]) < 1e-12 < max(worst.relative_errors[15])
    assert sqrt(sum(error**2 for row in worst.relative_errors for error in row)) > 1e-3
