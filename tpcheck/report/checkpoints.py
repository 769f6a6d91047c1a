"""What happened to the tensors of a checkpoint, as phrases; tensors with the same story are told of together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tpcheck.core import causes
from tpcheck.core.causes import Cause
from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import words
from tpcheck.report.words import Line, labelled, plain

CHECK = "checkpoint_matches_reference"
# Evidence that the phrases below use up.
PHRASED = frozenset(
    {"count_tensors"}
    | {"dtype_actual", "dtype_expected", "same_values", "actual", "expected", "only_in", "story", "actual_name"}
)
_NAMES_SHOWN = 3
# What a story says of a tensor is its own (a length, a place); what makes stories the same is the rest.
_SHARED = ("tp_rank", "tp", "order", "copies", "dtype", "equals", "factor", "runs_over")


def story_lines(verdict: Verdict) -> Iterator[Line]:
    """Yield how many tensors have which story; nothing where one tensor is wrong."""
    groups = story_groups(verdict.findings)
    if sum(map(len, groups)) < 2:
        return
    for group in groups:
        first = group[0]
        yield Line()
        head = f"{len(group)} of {words.count(first.evidence.get('count_tensors', len(group)), 'tensor')}: "
        saved = ", ".join(part for part in (str(first.where.get("field", "")), words.phase(first.where)) if part)
        head = f"{saved}: {head}" if saved else head
        yield Line(((head, "bold"), (cause(_of_all(group)), "yellow" if first.cause else "")))
        yield from labelled("tensors", words.few([str(one.where.get("parameter")) for one in group], _NAMES_SHOWN))
    yield Line()
    yield plain("The first tensor of each:")


def story_groups(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Return the findings on checkpoints, those with the same story together, the most frequent story first."""
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        if finding.check == CHECK:
            story = finding.evidence.get("story") or {}
            moment = (finding.where.get(name) for name in ("field", "phase", "step"))
            key = (finding.cause, *moment, *(str(story.get(name)) for name in _SHARED))
            groups.setdefault(key, []).append(finding)
    return sorted(groups.values(), key=len, reverse=True)


def _of_all(group: Sequence[Finding]) -> Finding:
    """Return the first finding, without the dim where that is not the same for all."""
    first = group[0]
    story = first.evidence.get("story") or {}
    if len({(one.evidence.get("story") or {}).get("dim") for one in group}) == 1:
        return first
    return replace(first, evidence={**first.evidence, "story": {**story, "dim": None}})


def amount(finding: Finding) -> str | None:
    """Return what differs and by how much, or None for what other phrases say."""
    evidence = finding.evidence
    if finding.check == CHECK and finding.cause == Cause.REPLICA_DRIFT.slug:
        return "its copies differ"
    if "only_in" in evidence:
        return f"only in {'actual' if evidence['only_in'] == 'actual' else 'the reference'}"
    if "dtype_actual" in evidence and "shape_actual" not in evidence:
        same = "; the values are the same" if evidence.get("same_values") else ""
        return f"dtype {evidence['dtype_actual']}, expected {evidence['dtype_expected']}{same}"
    return None


def values(evidence: Mapping[str, Any]) -> str | None:
    """Return the first values that differ."""
    if evidence.get("expected") is None or "actual" not in evidence:
        return None
    return f"{evidence['actual']}, expected {evidence['expected']}"


def cause(finding: Finding) -> str:
    """Return the cause's sentence, with what was found out of this tensor."""
    if finding.cause is None:
        return "unknown: no known cause passes its test"
    story = finding.evidence.get("story") or {}
    known = causes.cause_named(finding.cause)
    told = _TOLD.get(known) if known else None
    text = told(story) if told is not None else None
    return f"{finding.cause}: {text}" if text else causes.sentence(finding.cause, None)


def _shard(story: Mapping[str, Any]) -> str:
    dim = _along(story)
    if story.get("tp_rank") is None:
        return f"the tensor is a slice of the reference{dim}, from {story.get('from')}"
    blocks = f", of each of the blocks of {story['blocks']}" if story.get("blocks") else ""
    return f"the tensor is TP rank {story['tp_rank']}'s slice of the reference{dim}, of {story['tp']} ranks{blocks}"


def _order(story: Mapping[str, Any]) -> str:
    chunks = story.get("order") or story.get("from")
    return f"the tensor holds the reference's shards {chunks}{_along(story)}"


def _fused(story: Mapping[str, Any]) -> str:
    return (
        f"fused blocks of {story['blocks']}, in {story['parts']} parts each, lie in another order than in the reference"
        f"{_along(story)}"
    )


def _boundary(story: Mapping[str, Any]) -> str:
    if "padding" in story:
        spans = ", ".join(f"{start} to {stop - 1}" for start, stop in story["padding"])
        return f"the reference is all there{_along(story)}, with padding at {spans}"
    return f"index {story['first_wrong']}{_along(story)} holds the reference's {story['holds']}"


def _along(story: Mapping[str, Any]) -> str:
    return "" if story.get("dim") is None else f" along dim {story['dim']}"


def _rounded(story: Mapping[str, Any]) -> str:
    return f"the reference, rounded to {story['dtype']}, equals the tensor to the bit"


def _equals(story: Mapping[str, Any]) -> str | None:
    return f"the tensor equals {story['equals']} to the bit" if "equals" in story else None


def _tie(story: Mapping[str, Any]) -> str | None:
    partner = story.get("tied_with") or story.get("equals")
    named = partner if isinstance(partner, str) else ", ".join(partner or ())
    return f"the reference ties it with {named}" if named else None


def _missing(story: Mapping[str, Any]) -> str | None:
    return f"its bits are there under the name {story['stands_as']}" if story.get("stands_as") else None


def _copies(story: Mapping[str, Any]) -> str | None:
    return f"{story['copies']} whole copies stand one behind the other" if "copies" in story else None


def _flipped(story: Mapping[str, Any]) -> str | None:
    return f"bit {story['bit']} of one element differs" if "bit" in story else None


def _factor(story: Mapping[str, Any]) -> str | None:
    return f"the tensor equals the reference times {story['factor']} to the bit" if "factor" in story else None


_TOLD = {
    Cause.SHARD_MISSING: _shard,
    Cause.SHARD_ORDER_SWAPPED: _order,
    Cause.SHARD_REPEATED: _order,
    Cause.FUSED_BLOCKS_INTERLEAVED: _fused,
    Cause.WRONG_SHARD_BOUNDARY: _boundary,
    Cause.VOCAB_OFFSET_WRONG: _boundary,
    Cause.DTYPE_ROUNDED: _rounded,
    Cause.STALE_WEIGHT: _equals,
    Cause.TENSOR_OF_ANOTHER_LAYER: _equals,
    Cause.TIED_WEIGHT_UNTIED: _tie,
    Cause.TIED_WEIGHT_DROPPED: _tie,
    Cause.TENSOR_MISSING: _missing,
    Cause.NOT_SHARDED: _copies,
    Cause.BIT_FLIPPED: _flipped,
    Cause.REPLICA_DRIFT: lambda story: story.get("ranks"),
    Cause.DUPLICATE_REDUCE: _factor,
}
