"""Brings the answers of all TP groups together into one verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tpcheck.records import CheckResult, Coverage, Finding, Verdict
from tpcheck.verification.answer import CheckAnswer, GroupAnswer


def verdict(
    groups: Sequence[GroupAnswer],
    *,
    steps: int,
    subject: Mapping[str, Any],
    environment: Mapping[str, str],
    again: str | None,
    seconds: float,
) -> Verdict:
    """Return the verdict over all TP groups.

    What fails in consequence is dropped: steps after the first one at which any group failed.
    """
    last_step = min(group.last_step for group in groups)
    answers = [one for group in groups for one in group.answers if one.step <= last_step]
    findings = tuple(replace(finding, again=again) for finding in _merged(answers))
    return Verdict(
        verdict="failed" if findings else "passed",
        subject=subject,
        environment=environment,
        findings=findings,
        checks=_results(answers),
        coverage=_coverage(answers, last_step, steps),
        seconds=seconds,
    )


def _merged(answers: Sequence[CheckAnswer]) -> list[Finding]:
    """Return the findings in the order of the checks, those of several groups about one place as one."""
    merged: dict[tuple[Any, ...], Finding] = {}
    order = list(dict.fromkeys((one.step, one.check) for one in answers))
    for one in sorted(answers, key=lambda one: order.index((one.step, one.check))):
        for finding in one.findings:
            place = (finding.check, *(str(finding.where.get(key)) for key in _PLACE))
            known = merged.get(place)
            merged[place] = finding if known is None else _both(known, finding)
    return list(merged.values())


_PLACE = ("phase", "step", "module", "parameter", "field")


def _both(first: Finding, second: Finding) -> Finding:
    worse = second if second.margin > first.margin else first
    ranks = sorted({*first.where.get("ranks", ()), *second.where.get("ranks", ())})
    where = {key: value for key, value in worse.where.items() if key != "dp_rank"}
    also = [*worse.evidence.get("also", ())]
    also += [named for named in (first if worse is second else second).evidence.get("also", ()) if named not in also]
    evidence = {**worse.evidence, "also": also} if also else worse.evidence
    return replace(worse, where={**where, "ranks": ranks}, evidence=evidence)


def _results(answers: Sequence[CheckAnswer]) -> tuple[CheckResult, ...]:
    results: dict[str, CheckResult] = {}
    for one in answers:
        known = results.get(one.check, CheckResult(one.check, 0, 0.0))
        compared = known.compared + len(one.margins)
        worst_at = max(one.margins, key=one.margins.__getitem__, default=None)
        if worst_at is not None and one.margins[worst_at] > known.worst_margin:
            at = worst_at if one.step < 0 else f"{worst_at}, step {one.step}"
            results[one.check] = CheckResult(one.check, compared, one.margins[worst_at], at)
        else:
            results[one.check] = replace(known, compared=compared)
    return tuple(results.values())


def _coverage(answers: Sequence[CheckAnswer], last_step: int, steps: int) -> Coverage:
    compared = sum(len(one.margins) for one in answers)
    missed: dict[str, str] = {}
    for one in answers:
        moment = "" if one.step < 0 else f"step {one.step}: "
        missed.update({f"{one.check}: {moment}{name}": why for name, why in one.missed.items()})
    earlier = "the model at the start" if last_step < 0 else f"step {last_step}"
    for step in range(last_step + 1, steps):
        missed[f"step {step}"] = f"{earlier} already differs, so later steps mean nothing"
    return Coverage(compared, compared + len(missed), missed)
