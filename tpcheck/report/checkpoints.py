"""What happened to the tensors of a checkpoint, as phrases; tensors with the same explanation are reported together.

Each cause has a sentence in the catalogue, `core/causes.py`. The causes in `_PHRASES` are phrased here instead, with
the numbers and names that were found for the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tpcheck.core import causes
from tpcheck.core.causes import Cause
from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import words
from tpcheck.report.words import Line, labelled, plain

CHECK = "checkpoint_matches_reference"
PHRASED = frozenset(
    {"count_tensors"}
    | {"dtype_actual", "dtype_expected", "same_values", "actual", "expected", "only_in", "story", "actual_name"}
)
"""Keys of the evidence that the phrases below use."""

_MAX_NAMES = 3
# Findings with equal values of these keys share an explanation; lengths and offsets vary by tensor.
_GROUP_KEYS = ("tp_rank", "tp", "order", "copies", "dtype", "equals", "factor", "runs_over")

Details = Mapping[str, Any]
"""The evidence of an explanation: the entry "story" of a finding's evidence."""


def explanation_lines(verdict: Verdict) -> Iterator[Line]:
    """Yield how many tensors share each explanation; nothing where one tensor is wrong."""
    groups = group_by_explanation(verdict.findings)
    if sum(map(len, groups)) < 2:
        return
    for group in groups:
        first = group[0]
        yield Line()
        count = f"{len(group)} of {words.pluralize(first.evidence.get('count_tensors', len(group)), 'tensor')}: "
        saved = ", ".join(part for part in (str(first.where.get("field", "")), words.phase(first.where)) if part)
        head = f"{saved}: {count}" if saved else count
        yield Line(((head, "bold"), (cause(_for_group(group)), "yellow" if first.cause else "")))
        names = [str(finding.where.get("parameter")) for finding in group]
        yield from labelled("tensors", words.join_truncated(names, _MAX_NAMES))
    yield Line()
    yield plain("The first tensor of each:")


def group_by_explanation(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Return the findings on checkpoints, grouped by cause and explanation, the largest group first."""
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        if finding.check == CHECK:
            moment = (finding.where.get(name) for name in ("field", "phase", "step"))
            details = _details(finding)
            key = (finding.cause, *moment, *(str(details.get(name)) for name in _GROUP_KEYS))
            groups.setdefault(key, []).append(finding)
    return sorted(groups.values(), key=len, reverse=True)


def _details(finding: Finding) -> Details:
    return finding.evidence.get("story") or {}


def _for_group(group: Sequence[Finding]) -> Finding:
    """Return the first finding, without the dim where the group has several."""
    first = group[0]
    if len({_details(finding).get("dim") for finding in group}) == 1:
        return first
    return replace(first, evidence={**first.evidence, "story": {**_details(first), "dim": None}})


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
    """Return the cause's slug with a sentence on this tensor, or else the sentence of the catalogue."""
    if finding.cause is None:
        return words.UNKNOWN_CAUSE
    known = causes.cause_named(finding.cause)
    phrase = _PHRASES.get(known) if known else None
    text = phrase(_details(finding)) if phrase is not None else None
    return f"{finding.cause}: {text}" if text else causes.cause_text(finding.cause, None)


def _shard(details: Details) -> str:
    dim = _along_dim(details)
    if details.get("tp_rank") is None:
        return f"the tensor is a slice of the reference{dim}, from index {details.get('from')}"
    blocks = f", of each of the blocks of {details['blocks']}" if details.get("blocks") else ""
    return f"the tensor is TP rank {details['tp_rank']}'s slice of the reference{dim}, of {details['tp']} ranks{blocks}"


def _order(details: Details) -> str:
    return f"the tensor holds the reference's shards {details.get('order') or details.get('from')}{_along_dim(details)}"


def _fused(details: Details) -> str:
    return (
        f"fused blocks of {details['blocks']}, in {details['parts']} parts each, are in another order than in the "
        f"reference{_along_dim(details)}"
    )


def _boundary(details: Details) -> str:
    if "padding" in details:
        spans = ", ".join(f"{start} to {stop - 1}" for start, stop in details["padding"])
        return f"the reference is complete{_along_dim(details)}, with padding at {spans}"
    return f"index {details['first_wrong']}{_along_dim(details)} holds the reference's {details['holds']}"


def _along_dim(details: Details) -> str:
    return "" if details.get("dim") is None else f" along dim {details['dim']}"


def _tie(details: Details) -> str | None:
    partner = details.get("tied_with") or details.get("equals")
    names = partner if isinstance(partner, str) else ", ".join(partner or ())
    return f"the reference ties it with {names}" if names else None


def _if_known(key: str, phrase: str) -> Callable[[Details], str | None]:
    return lambda details: phrase.format(details[key]) if details.get(key) is not None else None


_PHRASES: Mapping[Cause, Callable[[Details], str | None]] = {
    Cause.SHARD_MISSING: _shard,
    Cause.SHARD_ORDER_SWAPPED: _order,
    Cause.SHARD_REPEATED: _order,
    Cause.FUSED_BLOCKS_INTERLEAVED: _fused,
    Cause.WRONG_SHARD_BOUNDARY: _boundary,
    Cause.VOCAB_OFFSET_WRONG: _boundary,
    Cause.TIED_WEIGHT_UNTIED: _tie,
    Cause.TIED_WEIGHT_DROPPED: _tie,
    Cause.DTYPE_ROUNDED: _if_known("dtype", "the tensor is bitwise equal to the reference rounded to {}"),
    Cause.STALE_WEIGHT: _if_known("equals", "the tensor is bitwise equal to {}"),
    Cause.TENSOR_OF_ANOTHER_LAYER: _if_known("equals", "the tensor is bitwise equal to {}"),
    Cause.TENSOR_MISSING: _if_known("stands_as", "its bits are there under the name {}"),
    Cause.NOT_SHARDED: _if_known("copies", "the tensor is {} whole copies, concatenated"),
    Cause.BIT_FLIPPED: _if_known("bit", "bit {} of one element differs"),
    Cause.REPLICA_DRIFT: _if_known("ranks", "{}"),
    Cause.DUPLICATE_REDUCE: _if_known("factor", "the tensor is bitwise equal to the reference times {}"),
}
"""The phrases of checkpoints; a cause without one, or without its evidence, has the sentence of `core/causes.py`."""
