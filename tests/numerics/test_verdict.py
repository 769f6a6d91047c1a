"""Results of checks are explained, joined by mistake, and merged over TP groups into one verdict."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch

from tests.numerics.evidence import (
    BIAS,
    BUFFER,
    DOWN,
    NORM,
    UP,
    key,
    right_evidence,
    with_digest,
    with_step,
    with_tensor,
)
from tpcheck.backends.layout import Layout
from tpcheck.core.causes import Cause
from tpcheck.core.check_names import need_steps
from tpcheck.core.findings import CheckResult, Finding, ModuleMargins
from tpcheck.numerics.checks import CHECK_NAMES, STEP_CHECKS
from tpcheck.numerics.evidence import Collective, Evidence, MarginsByModule
from tpcheck.numerics.group_answer import advised_once, full_answer, group_findings, start_answer
from tpcheck.numerics.verdict import CheckAnswer, GroupAnswer, forbids_training, verdict

RIGHT = right_evidence()
WEIGHTS, REPLICAS, OUTPUTS, GRADIENTS = (
    "weights_match_reference", "replicas_agree", "outputs_match_reference", "gradients_match_reference"
)  # fmt: skip


def finding(parameter: str, cause: str | None = "transposed", check: str = WEIGHTS, **fields: Any) -> Finding:
    where = {"phase": "start", "parameter": parameter, "ranks": [0], **fields.pop("where", {})}
    return Finding(check, where, fields.pop("observed", 1.0), 0.0, cause, fields)


def grouped(*findings: Finding) -> list[tuple[str, list[str]]]:
    """Return each finding's parameter and the others that it names."""
    return [(each.where["parameter"], each.evidence.get("also", [])) for each in group_findings(findings)]


def test_findings_of_one_mistake_are_one_that_names_every_parameter() -> None:
    names = [f"layers.{number}.weight" for number in range(20)]
    assert grouped(*map(finding, names)) == [(names[0], names[1:])]


@pytest.mark.parametrize(
    "other",
    [
        finding("b", "bit_flipped"),
        finding("b", where={"ranks": [1]}),
        finding("b", where={"phase": "update"}),
        finding("b", check=GRADIENTS),
        finding("b", note="another story"),
    ],
)
def test_findings_of_different_mistakes_stay_apart(other: Finding) -> None:
    assert [name for name, _ in grouped(finding("a"), other)] == ["a", "b"]


@pytest.mark.parametrize("cause", ["optimizer_sees_one_shard", "clipped_per_group"])
def test_a_mistake_whose_ratios_differ_by_parameter_is_one(cause: str) -> None:
    names = ("a", "b", "c")
    findings = [finding(name, cause, gradient_ratio=[1.0, number]) for number, name in enumerate(names)]
    assert grouped(*findings) == [("a", ["b", "c"])]


def test_findings_of_activations_are_never_joined() -> None:
    activation = finding("a", where={"field": "output 0"})
    assert len(group_findings([activation, activation])) == 2


@pytest.mark.parametrize(("number", "joined"), [(4, 4), (5, 1)])
def test_a_few_unexplained_gradients_stay_apart(number: int, joined: int) -> None:
    gradients = [finding(str(each), None, GRADIENTS, where={"phase": "backward"}) for each in range(number)]
    assert len(group_findings(gradients)) == joined


def test_names_beside_a_joined_finding_are_kept_once() -> None:
    assert grouped(finding("a", also=["b", "c"]), finding("b", also=["a", "d"])) == [("a", ["b", "c", "d"])]


def all_weights_wrong(evidence: Evidence) -> Evidence:
    return replace(
        evidence,
        initial_parts=tuple(
            {name: torch.rand(part.shape, dtype=part.dtype) for name, part in parts.items()}
            for parts in evidence.initial_parts
        ),
    )


def test_a_module_that_is_wrong_from_the_start_accounts_for_its_other_findings() -> None:
    evidence = with_digest(RIGHT, ("parameter", NORM), [1], moment=0)
    weights, replicas = (
        each for answer in start_answer(all_weights_wrong(evidence), [WEIGHTS, REPLICAS]).answers
        for each in answer.findings
    )  # fmt: skip
    assert [weights.where["parameter"], *weights.evidence["also"]] == [NORM, UP, DOWN, BIAS]
    assert "follows_from" not in weights.evidence
    assert replicas.evidence["follows_from"] == WEIGHTS


def test_weights_gathered_over_a_wrong_group_have_no_cause() -> None:
    facts = (replace(RIGHT.facts[0], group_ranks={"tp": ((0, 2),)}), *RIGHT.facts[1:])
    first, second = (part[UP] for part in RIGHT.initial_parts)
    swapped = tuple({**part, UP: tensor} for part, tensor in zip(RIGHT.initial_parts, (second, first), strict=True))
    evidence = replace(RIGHT, initial_parts=swapped)
    (answer,) = start_answer(evidence, [WEIGHTS]).answers
    assert answer.findings[0].cause == "shard_order_swapped"
    start = start_answer(replace(evidence, facts=facts), CHECK_NAMES)
    (weights,) = (each for answer in start.answers for each in answer.findings if answer.check == WEIGHTS)
    assert weights.cause is None
    assert weights.evidence["follows_from"] == "groups_match_topology"


def test_ranks_that_are_no_tp_model_are_not_trained() -> None:
    assert not forbids_training(start_answer(RIGHT, CHECK_NAMES))
    assert not forbids_training(start_answer(all_weights_wrong(RIGHT), CHECK_NAMES))
    layouts = {name: Layout.replicated(tensor.shape, 2) for name, tensor in RIGHT.initial.items()}
    assert forbids_training(start_answer(replace(RIGHT, layouts=layouts), CHECK_NAMES))


def answer_of(evidence: Evidence, checks: Any = CHECK_NAMES) -> GroupAnswer:
    return full_answer(start_answer(evidence, checks), evidence, checks)


def test_a_right_run_passes_every_check_of_every_step() -> None:
    answer = answer_of(right_evidence(steps=2, dp=2))
    assert answer.last_step == 1
    assert not any(each.findings for each in answer.answers)
    assert {each.check for each in answer.answers} == set(CHECK_NAMES)


def test_steps_after_the_first_wrong_one_are_not_checked() -> None:
    evidence = with_tensor(right_evidence(steps=2), "gradients", UP, lambda gradient: gradient * 2)
    assert answer_of(evidence).last_step == 0


def test_a_finding_says_what_to_change_where_its_cause_is_not_about_files() -> None:
    norm = RIGHT.reference[0].gradient_norm
    assert norm is not None
    (wrong_norm,) = (
        each for answer in answer_of(with_step(RIGHT, gradient_norm=norm**2)).answers for each in answer.findings
    )
    assert wrong_norm.cause == Cause.NORM_WITHOUT_ROOT.slug
    assert wrong_norm.evidence["advice"] == Cause.NORM_WITHOUT_ROOT.advise()
    swapped = with_tensor(RIGHT, "weights", UP, lambda weight: weight.flip(0))
    assert not any("advice" in each.evidence for answer in answer_of(swapped).answers for each in answer.findings)


@pytest.mark.parametrize("check", [OUTPUTS, GRADIENTS])
def test_gradients_that_are_averaged_with_those_of_a_wrong_replica_follow_from_it(check: str) -> None:
    activation = Finding(
        check, {"phase": "forward", "step": 0, "module": "loss", "field": "output 0"}, 1.0, 0.1, None, {}
    )
    wrong = {"phase": "backward", "step": 0, "module": "up", "parameter": UP, "ranks": [0, 1]}
    scaled = Finding(GRADIENTS, wrong, 1.0, 0.1, "gradient_scaled", {"inputs_agree": True, "advice": "any"})

    def found(*of_groups: tuple[Finding, ...]) -> dict[str | None, tuple[str | None, Any]]:
        groups = [
            GroupAnswer(tuple(CheckAnswer(each.check, 0, {}, (each,), {}) for each in findings), 0)
            for findings in of_groups
        ]
        report = verdict(groups, steps=1, subject={}, environment={}, again=None, seconds=0.0)
        return {
            each.where.get("parameter"): (each.cause, each.evidence.get("follows_from")) for each in report.findings
        }

    assert found((activation,), (scaled,)) == {None: (None, None), UP: (None, check)}
    assert found((scaled,), (scaled,)) == {UP: ("gradient_scaled", None)}
    assert found((activation, scaled), (activation, scaled))[UP] == ("gradient_scaled", None)


def test_an_advice_is_given_once() -> None:
    evidence = with_tensor(RIGHT, "gradients", UP, lambda gradient: torch.zeros_like(gradient))
    unseen = Collective("block.up", "all_reduce", (0, 1), bypasses_autograd=True)
    for rank in (0, 1):
        seen = evidence.candidate[0][rank].activations
        kept = {each: seen[each] for each in seen if each != key("block.up output", "backward")}
        evidence = with_step(evidence, ranks=[rank], activations=kept, collectives=(unseen,))
    answers = answer_of(evidence).answers
    again = GroupAnswer((*answers, *answers)).answers
    assert sum("advice" in finding.evidence for answer in again for finding in answer.findings) == 2
    assert sum("advice" in finding.evidence for answer in advised_once(again) for finding in answer.findings) == 1


def test_the_first_check_of_a_step_that_fails_accounts_for_what_has_no_cause() -> None:
    evidence = with_tensor(RIGHT, "activations", key("block.down output"), lambda tensor: tensor * 1.7)
    evidence = with_tensor(evidence, "activations", key("block output"), lambda tensor: tensor * 1.7)
    evidence = with_tensor(evidence, "gradients", BIAS, lambda gradient: gradient + torch.rand(4).double())
    outputs, gradients = (each for answer in answer_of(evidence).answers for each in answer.findings)
    assert "follows_from" not in outputs.evidence
    assert gradients.evidence["follows_from"] == OUTPUTS


def test_a_check_that_is_not_named_still_accounts_for_others() -> None:
    evidence = with_tensor(RIGHT, "gradients", UP, lambda gradient: gradient * 2)
    answer = answer_of(evidence, [WEIGHTS])
    assert {each.check for each in answer.answers} == {WEIGHTS}
    assert answer.last_step == 0


def the_verdict(*groups: GroupAnswer, steps: int = 1) -> Any:
    return verdict(groups, steps=steps, subject={}, environment={}, again="tpcheck verify llama", seconds=0.0)


def test_a_verdict_has_the_findings_the_results_and_the_command() -> None:
    evidence = with_tensor(RIGHT, "gradients", UP, lambda gradient: gradient * 2)
    found = the_verdict(answer_of(evidence), steps=2)
    assert (found.verdict, len(found.findings), found.findings[0].again) == ("failed", 1, "tpcheck verify llama")
    worst = next(result for result in found.checks if result.check == GRADIENTS)
    assert worst.worst_at == f"{UP}, step 0"
    assert worst.worst_margin == pytest.approx(found.findings[0].margin)
    reason = "step 0 already differs, so differences in later steps would only follow from it"
    assert found.coverage.not_compared == {"step 1": reason}
    assert found.coverage.total == found.coverage.compared + 1


def test_a_run_without_findings_passes() -> None:
    found = the_verdict(answer_of(RIGHT))
    assert found.verdict == "passed"
    assert CheckResult(WEIGHTS, 4, 0.0) in found.checks


def test_what_was_not_compared_is_covered_by_its_check_and_step() -> None:
    missing = {"a": "it is sparse"}
    start, step = (CheckAnswer(WEIGHTS, number, {"b": 0.0}, (), missing) for number in (-1, 0))
    coverage = the_verdict(GroupAnswer((start, step), last_step=0)).coverage
    assert coverage.not_compared == {f"{WEIGHTS}: a": "it is sparse", f"{WEIGHTS}: step 0: a": "it is sparse"}
    assert (coverage.compared, coverage.total) == (2, 4)


def test_a_model_that_differs_at_the_start_is_given_as_the_reason() -> None:
    wrong = CheckAnswer(WEIGHTS, -1, {UP: inf}, (finding(UP),), {})
    reasons = the_verdict(GroupAnswer((wrong,))).coverage.not_compared
    assert list(reasons) == ["step 0"]
    assert reasons["step 0"].startswith("the model at the start already differs")


def test_steps_that_no_check_asked_for_are_not_said_to_be_missed() -> None:
    assert not the_verdict(GroupAnswer((CheckAnswer(WEIGHTS, -1, {UP: 0.0}, (), {}),))).coverage.not_compared


def test_a_finding_has_its_cause_with_the_evidence_and_the_error() -> None:
    evidence = with_tensor(RIGHT, "gradients", UP, lambda gradient: gradient * 2)
    (found,) = (each for answer in answer_of(evidence).answers for each in answer.findings)
    assert found.cause == "gradient_scaled"
    assert found.evidence["factors"] == [2.0, 2.0]
    assert found.evidence["cause_error"] < 1e-12
    unknown = with_tensor(RIGHT, "gradients", UP, torch.rand_like)
    (found,) = (each for answer in answer_of(unknown).answers for each in answer.findings)
    assert found.cause is None
    assert "cause_error" not in found.evidence


def test_a_module_has_its_worst_margins_over_steps_and_groups() -> None:
    def of_group(**margins: float | None) -> GroupAnswer:
        forward: MarginsByModule = {("forward", name): margin for name, margin in margins.items()}
        backward: MarginsByModule = {("backward", name): margin for name, margin in margins.items()}
        outputs = CheckAnswer("outputs_match_reference", 0, {}, (), {}, forward)
        return GroupAnswer((outputs, CheckAnswer(GRADIENTS, 0, {}, (), {}, backward)), last_step=0)

    found = the_verdict(of_group(a=0.1, b=None), of_group(a=0.3, b=None)).modules
    assert found == (ModuleMargins("a", 0.3, 0.3), ModuleMargins("b", None, None))


def test_modules_are_judged_by_what_they_compute() -> None:
    evidence = with_tensor(RIGHT, "gradients", UP, lambda gradient: gradient * 2)
    right, wrong = (
        {each.module: each for each in the_verdict(answer_of(given)).modules} for given in (RIGHT, evidence)
    )
    module = UP.rpartition(".")[0]
    assert right.keys() == wrong.keys()
    assert all((each.forward or 0.0) <= 1 and (each.backward or 0.0) <= 1 for each in right.values())
    assert {name for name, each in wrong.items() if (each.backward or 0.0) > 1} == {module}
    assert all((each.forward or 0.0) <= 1 for each in wrong.values())


def test_the_first_finding_of_a_check_says_where_in_its_tensor_the_error_lies() -> None:
    def wrong(gradient: torch.Tensor) -> torch.Tensor:
        changed = gradient.clone()
        changed[0, 0] += 1
        return changed

    (found,) = (
        each for answer in answer_of(with_tensor(RIGHT, "gradients", UP, wrong)).answers for each in answer.findings
    )
    tiles = torch.tensor(found.evidence["error_map"]["tiles"])
    assert [shard["ranks"] for shard in found.evidence["error_map"]["shards"]] == [[0], [1]]
    assert int(tiles.count_nonzero()) == 2  # the first element of each rank's shard
    assert float(tiles.norm()) == pytest.approx(found.observed, rel=1e-2)


@pytest.mark.parametrize("margins", [(2.0, 3.0), (3.0, 2.0)])
def test_of_findings_of_several_groups_the_worse_is_shown(margins: tuple[float, float]) -> None:
    groups = (
        GroupAnswer((CheckAnswer(GRADIENTS, 0, {}, (finding_of_margin(margin, rank),), {}),), last_step=0)
        for rank, margin in enumerate(margins)
    )
    (found,) = the_verdict(*groups).findings
    assert (found.margin, found.where["ranks"]) == (3.0, [0, 1])
    assert "also" not in found.evidence


def finding_of_margin(margin: float, rank: int) -> Finding:
    return Finding(GRADIENTS, {"phase": "backward", "parameter": "a", "ranks": [rank]}, margin, 1.0)


def test_what_several_groups_find_in_one_place_is_one_finding_of_all_their_ranks() -> None:
    def of_group(rank: int, observed: float, *also: str) -> GroupAnswer:
        where = {"ranks": [rank], "dp_rank": rank}
        return GroupAnswer(
            (CheckAnswer(WEIGHTS, -1, {}, (finding("a", where=where, observed=observed, also=list(also)),), {}),)
        )

    (found,) = the_verdict(of_group(0, 1.0, "b", "c"), of_group(1, 2.0, "c", "d")).findings
    assert found.where["ranks"] == [0, 1]
    assert "dp_rank" not in found.where
    assert found.observed == 1.0  # both are exact: infinitely wrong
    assert found.evidence["also"] == ["b", "c", "d"]


def test_findings_of_a_later_step_are_dropped_where_another_group_failed_before() -> None:
    early, late = (
        GroupAnswer((CheckAnswer(GRADIENTS, step, {}, (finding(str(step), check=GRADIENTS),), {}),), last_step=step)
        for step in (0, 1)
    )
    assert [each.where["parameter"] for each in the_verdict(early, late, steps=2).findings] == ["0"]


def test_every_replica_that_differs_is_named_with_its_kind() -> None:
    evidence = RIGHT
    for item in (("parameter", NORM), ("parameter", BIAS), ("buffer", BUFFER)):
        evidence = with_digest(evidence, item, [1], moment=0)
    (found,) = start_answer(evidence, [REPLICAS]).answers[0].findings
    assert found.evidence["count_differing"] == 3
    assert found.evidence["also"] == [{"kind": "parameter", "name": BIAS}, {"kind": "buffer", "name": BUFFER}]


@pytest.mark.parametrize("check", CHECK_NAMES)
def test_steps_are_trained_for_the_checks_of_steps_alone(check: str) -> None:
    assert need_steps([check]) == (check in STEP_CHECKS)


def test_a_check_that_compared_something_else_alone_has_not_passed() -> None:
    beside = CheckAnswer(WEIGHTS, 0, {"buffer b": 0.0}, (), {"a": "it does not move"}, compared_only="buffers")
    alone = the_verdict(GroupAnswer((beside,), last_step=0))
    assert (alone.verdict, alone.message) == ("skipped", "nothing was compared but buffers: it does not move")
    assert (alone.checks[0].compared_only, alone.checks[0].says_something) == ("buffers", False)
    about = CheckAnswer(WEIGHTS, 1, {"a": 0.5}, (), {})
    later = the_verdict(GroupAnswer((beside, about), last_step=1))
    assert (later.verdict, later.checks[0].compared_only, later.checks[0].compared) == ("passed", None, 2)
