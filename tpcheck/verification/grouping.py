"""Makes one finding of those that tell one story: parameters that are wrong at one moment, on the same ranks, alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from tpcheck.records import Finding

_STORIES = ("factors", "rounded_to", "note", "story", "gradient_ratio", "weight_ratio", "momentum_ratio")
_UNEXPLAINED = 4  # findings without a cause that are told one by one


def grouped(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return the findings with those of one story as one, which names the others in its evidence.

    Only findings about parameters are joined. Those of the gradients that no cause explains may be as many mistakes:
    they stay apart where they are few.
    """
    by_story: dict[Hashable, list[Finding]] = {}
    unexplained = sum(1 for one in findings if one.cause is None and _is_of_parameter(one))
    for place, finding in enumerate(findings):
        alone = not _is_of_parameter(finding) or (_stands_alone(finding) and unexplained <= _UNEXPLAINED)
        by_story.setdefault(place if alone else _story(finding), []).append(finding)
    return tuple(_joined(of_one) for of_one in by_story.values())


def _is_of_parameter(finding: Finding) -> bool:
    return "parameter" in finding.where and "field" not in finding.where


def _stands_alone(finding: Finding) -> bool:
    return finding.cause is None and finding.where.get("phase") == "backward"


def _story(finding: Finding) -> Hashable:
    told = tuple(str(finding.evidence.get(name)) for name in _STORIES) if finding.cause is not None else ()
    return (finding.check, finding.where.get("phase"), finding.cause, tuple(finding.where.get("ranks", ())), told)


def _joined(findings: Sequence[Finding]) -> Finding:
    first, *rest = findings
    if not rest:
        return first
    names = [str(one.where["parameter"]) for one in rest]
    known = [name for one in findings for name in one.evidence.get("also", ()) if name != first.where["parameter"]]
    return replace(first, evidence={**first.evidence, "also": list(dict.fromkeys([*names, *known]))})
