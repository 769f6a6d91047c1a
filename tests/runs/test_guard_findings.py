"""The findings of a guard: what explains others comes first, tensors of the same ranks are one finding."""

from __future__ import annotations

import pytest

from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import Report
from tpcheck.runs.guarding.findings import NotFinite, described, findings_of
from tpcheck.runs.guarding.replica_digests import Difference, Label


def difference(label: Label, *, odd: int = 1, right_at: int | None = 100, values: tuple[str, ...] = ()) -> Difference:
    """Return the difference of one rank of three."""
    digests = {rank: b"b" if rank == odd else b"a" for rank in range(3)}
    return Difference(label, digests, dict(enumerate(values)) or dict.fromkeys(digests, ""), right_at)


def test_numbers_come_before_the_tensors_that_they_change() -> None:
    found = [
        difference(("weight", "q.weight", "")),
        difference(("state", "q.weight", "exp_avg")),
        difference(("option", "lr", "0"), values=("0.1", "0.2", "0.1")),
        difference(("optimizer steps", "", ""), values=("200", "199", "200")),
        difference(("input", "labels", "")),
    ]
    findings = findings_of(found, [], 200)
    assert [(finding.check, finding.where["field"]) for finding in findings] == [
        ("batches_agree_within_tp", "labels"),
        ("replicas_agree", "optimizer steps"),
        ("replicas_agree", "learning rate of parameter group 0"),
        ("replicas_agree", "weight q.weight"),
    ]
    assert all(finding.where["ranks"] == [1] for finding in findings)


def test_tensors_of_the_same_ranks_are_one_finding_that_lists_all() -> None:
    names = [f"layers.{number}.weight" for number in range(40)]
    found = [difference(("weight", name, ""), odd=number // 20) for number, name in enumerate(names)]
    first, second = findings_of(found, [], 200)
    assert (first.where["parameter"], first.where["ranks"], first.observed) == (names[0], [0], 20)
    assert [entry["name"] for entry in second.evidence["also"]] == names[21:]


@pytest.mark.parametrize(("right_at", "cause"), [(100, "replica_drift"), (None, None)])
def test_replicas_that_were_never_equal_have_not_drifted(right_at: int | None, cause: str | None) -> None:
    (finding,) = findings_of([difference(("weight", "w", ""), right_at=right_at)], [], 200)
    assert finding.cause == cause
    assert finding.evidence.get("last_right_step") == right_at


def test_what_was_not_compared_before_does_not_hide_that_weights_have_drifted() -> None:
    found = [difference(("weight", "w", "")), difference(("gradient", "w", ""), right_at=None)]
    (finding,) = findings_of(found, [], 200)
    assert (finding.cause, finding.evidence["last_right_step"]) == ("replica_drift", 100)


def test_gradients_that_are_not_finite_are_one_finding() -> None:
    found = [NotFinite("a", 0), NotFinite("b", 0), NotFinite("a", 1)]
    (finding,) = findings_of([], found, 200)
    assert (finding.where["parameter"], finding.where["ranks"], finding.observed) == ("a", [0, 1], 2)
    assert finding.cause == "not_finite"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (("gradient", "q.weight", ""), "gradient q.weight"),
        (("master", "q.weight", ""), "master q.weight"),
        (("buffer", "rotary.inv_freq", ""), "buffer rotary.inv_freq"),
        (("option", "betas", "0"), "betas of parameter group 0"),
        (("loss scale", "", ""), "loss scale"),
    ],
)
def test_labels_in_words(label: Label, words: str) -> None:
    assert described(label) == words


def text_of(*findings: Finding) -> str:
    return Report(Verdict("failed", {"model": "Llama", "tp": 3, "steps": 200}, {}, findings)).to_text()


def test_a_report_says_what_where_and_since_when() -> None:
    found = [difference(("weight", "norm.weight", "")), difference(("state", "norm.weight", "exp_avg"))]
    text = text_of(*findings_of(found, [], 200))
    assert "replicas_agree  weight norm.weight" in text
    assert "2 tensors differ on rank 1" in text
    assert "the replicas were equal and have drifted apart" in text
    assert "also      state norm.weight exp_avg" in text
    assert "equal at the check after step 100, different at this one, after step 200" in text


def test_a_report_of_a_number_has_the_values_of_all_ranks() -> None:
    found = [difference(("option", "lr", "0"), values=("0.1", "0.2", "0.1"))]
    text = text_of(*findings_of(found, [], 200))
    assert "values    0.1 on rank 0, 0.2 on rank 1, 0.1 on rank 2" in text
