"""Runs with pipeline stages: what two stages share is compared as a run of its own, and the verdicts are joined.

The parameters of all stages together are the model's. A later stage is called with activations, not samples: it has the
samples of the first stage's ranks, and rows of its own outputs, keyed by what it was called with, are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict, VerdictName
from tpcheck.core.name_maps import NameMap
from tpcheck.runs.comparing.comparisons import ACTIVATIONS
from tpcheck.runs.trace.files import ChangedSteps
from tpcheck.runs.trace.records import RankTrace, StepRecord, TensorRecord

_OF_ONE_RUN = ("only the actual run has it", "only the expected run has it")
_LATER_STAGE = "a later pipeline stage has it, whose rows are keyed by what that stage was called with, not by samples"
_ROOT = "stages call the root module with other tensors than the whole model is called with"


@dataclass(frozen=True, slots=True)
class StagePair:
    """The traces of two stages, each with what the other has alone.

    Attributes:
        actual, expected: By rank.
        stages: The numbers of both stages.
    """

    actual: tuple[RankTrace, ...]
    expected: tuple[RankTrace, ...]
    stages: tuple[int, int]


def has_stages(traces: Sequence[RankTrace]) -> bool:
    return any(trace.topology.pp > 1 for trace in traces)


def stage_pairs(actual: Sequence[RankTrace], expected: Sequence[RankTrace], names: NameMap) -> Iterator[StagePair]:
    """Yield each pair of stages of two runs that have parameters in common; a run without stages is one stage."""
    stages_a, stages_e = _by_stage(actual), _by_stage(expected)
    for number_a, traces_a in stages_a.items():
        names_a = _parameters(traces_a, lambda name: names.renamed(name, is_actual=True))
        for number_e, traces_e in stages_e.items():
            names_e = _parameters(traces_e, lambda name: names.renamed(name, is_actual=False))
            shared = names_a & names_e
            if not shared:
                continue
            has_samples = number_a == number_e == 0
            sides = []
            for traces, stages, is_actual in ((traces_a, stages_a, True), (traces_e, stages_e, False)):

                def keeps(record: TensorRecord, is_actual: bool = is_actual) -> bool:
                    if record.kind in ACTIVATIONS:
                        return has_samples and bool(record.name)  # noqa: B023
                    return names.renamed(record.name, is_actual=is_actual) in shared  # noqa: B023

                sides.append(tuple(_restricted(trace, _sampled_by(trace, stages[0]), keeps) for trace in traces))
            yield StagePair(sides[0], sides[1], (number_a, number_e))


def _by_stage(traces: Sequence[RankTrace]) -> dict[int, list[RankTrace]]:
    stages: dict[int, list[RankTrace]] = {}
    for trace in traces:
        stages.setdefault(_stage(trace), []).append(trace)
    return dict(sorted(stages.items()))


def _stage(trace: RankTrace) -> int:
    return trace.topology.coordinate(trace.rank).get("pp", 0) if trace.topology.pp > 1 else 0


def _parameters(traces: Sequence[RankTrace], renamed: Callable[[str], str]) -> set[str]:
    return {renamed(record.name) for trace in traces for record in trace.initial if record.kind == "weight"}


def _sampled_by(trace: RankTrace, first_stage: Sequence[RankTrace]) -> RankTrace:
    """Return the trace of the rank of the first stage that is given the samples of this one."""
    if trace.topology.pp <= 1:
        return trace
    wanted = {**trace.topology.coordinate(trace.rank), "pp": 0}
    return next((each for each in first_stage if each.topology.coordinate(each.rank) == wanted), trace)


def _restricted(trace: RankTrace, sampled_by: RankTrace, keeps: Callable[[TensorRecord], bool]) -> RankTrace:
    """Return a trace with some of its tensors, and the samples that the first stage was given for them."""

    def restricted(position: int, step: StepRecord) -> StepRecord:
        given = sampled_by.steps[position].passes if position < len(sampled_by.steps) else step.passes
        passes = tuple(
            replace(own, leaves=first.leaves, samples=first.samples)
            for own, first in zip(step.passes, given, strict=False)
        )
        tensors = tuple(record for record in step.tensors if keeps(record))
        return replace(step, tensors=tensors, passes=passes, reported_norm=None)  # the norm is that of all stages

    initial = tuple(record for record in trace.initial if keeps(record))
    return replace(trace, initial=initial, steps=ChangedSteps(trace.steps, restricted))


def joined_verdict(verdicts: Mapping[tuple[int, int], Verdict], stages: tuple[int, int]) -> Verdict:
    """Return the verdict on runs of which each pair of stages has one.

    Of the findings, those of the first step that has any are kept: later ones follow. A mistake of a stage reaches the
    gradients of the stages before it, so those of the last stage come first.
    """
    ordered = [verdicts[pair] for pair in sorted(verdicts)]
    first_step = min((_step(finding) for each in ordered for finding in each.findings), default=-1)
    numbered = [
        (finding.where.get("phase") not in ("start", "forward"), number, finding)
        for number, each in enumerate(ordered)
        for finding in each.findings
        if _step(finding) == first_step
    ]
    numbered.sort(key=lambda each: (each[0], -each[1] if each[0] else each[1]))
    findings = tuple(finding for *_, finding in numbered)
    not_compared: dict[str, str] = {"norms that loops clipped by": "they are of the gradients of all stages"}
    not_compared["outputs of the root module"] = _ROOT
    for verdict in ordered:
        for label, reason in verdict.coverage.not_compared.items():
            not_compared.setdefault(label, _LATER_STAGE if reason in _OF_ONE_RUN else reason)
    compared = sum(verdict.coverage.compared for verdict in ordered)
    is_skipped = any(verdict.verdict == "skipped" for verdict in ordered)
    name: VerdictName = "failed" if findings else "skipped" if is_skipped else "passed"
    messages = dict.fromkeys(verdict.message for verdict in ordered if verdict.message)
    subject = {**ordered[0].subject, "pp": stages[0], "expected_pp": stages[1]}
    return replace(
        ordered[0],
        verdict=name,
        subject=subject,
        findings=findings,
        checks=_joined_checks(ordered),
        coverage=Coverage(compared, compared + len(not_compared), not_compared),
        message="\n".join(messages) or None,
        modules=tuple(module for verdict in ordered for module in verdict.modules),
    )


def _step(finding: Finding) -> int:
    step: int = finding.where.get("step", -1)
    return step


def _joined_checks(verdicts: Sequence[Verdict]) -> tuple[CheckResult, ...]:
    joined: dict[str, CheckResult] = {}
    for check in (check for verdict in verdicts for check in verdict.checks):
        known = joined.get(check.check)
        if known is None:
            joined[check.check] = check
        else:
            worst = max(known, check, key=lambda each: each.worst_margin)
            joined[check.check] = replace(worst, compared=known.compared + check.compared)
    return tuple(joined.values())
