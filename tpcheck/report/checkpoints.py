"""What happened to the tensors of a checkpoint, as phrases; tensors with the same explanation are reported together.

Each cause has a sentence in the catalogue, `core/causes.py`. The causes in `_PHRASES` are phrased here instead, with
the numbers and names that were found for the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpcheck.core import causes
from tpcheck.core.causes import Cause
from tpcheck.core.check_names import CHECKPOINT_CHECK
from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import words
from tpcheck.report.words import Line, labelled, plain

PHRASED = frozenset(
    {"count_tensors", "states"}
    | {"dtype_actual", "dtype_expected", "same_values", "actual", "expected", "only_in", "story", "actual_name"}
)
"""Keys of the evidence that the phrases below use."""

_MAX_NAMES = 3
_MAX_PATTERNS = 6  # of names that differ in numbers alone
# Findings with equal values of these keys share an explanation; lengths, offsets and names vary by tensor.
_GROUP_KEYS = ("tp_rank", "tp", "order", "copies", "dtype", "factor", "runs_over", "constant")
# Other tensors of the model that an explanation names, by what they are to the tensor.
_OTHER_NAMES = {"equals": "is", "stands_as": "stands as", "partner": "and"}
_EARLIER = Cause.STALE_WEIGHT.slug  # what such a tensor equals is a checkpoint

Details = Mapping[str, Any]
"""The evidence of an explanation: the entry "story" of a finding's evidence."""


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """What happened to some tensors or values: how many they are, the likely cause, and their names."""

    head: str
    cause: str
    is_known: bool
    label: str
    names: str


def explanation_lines(verdict: Verdict) -> Iterator[Line]:
    """Yield how many tensors share each explanation; nothing where one tensor is wrong."""
    groups = group_by_explanation(verdict.findings)
    if sum(map(len, groups)) < 2:
        return
    for group in groups:
        summary = group_summary(group)
        yield Line()
        of_values = summary.label == "values"  # their cause is no sentence of its own
        style = "bold" if of_values else "yellow" if summary.is_known else ""
        yield Line(((summary.head, "bold"), (f": {summary.cause}" if summary.cause else "", style)))
        yield from labelled(summary.label, summary.names)
    yield Line()
    yield plain("The first tensor of each:")


def group_summary(group: Sequence[Finding]) -> GroupSummary:
    """Return what the findings of one explanation have in common."""
    first = group[0]
    is_state = "states" in first.evidence
    saved = ", ".join(part for part in (str(first.where.get("field", "")), words.phase(first.where)) if part)
    saved = "training states" if is_state else saved
    known = first.cause is not None
    if "counted" in first.evidence:  # values, not tensors
        verb = "differs" if len(group) == 1 else "differ"
        head = f"{saved}: {words.pluralize(len(group), 'value')} {verb}"
        return GroupSummary(head, cause(first) if known else "", known, "values", _values(group))
    total = first.evidence.get("count_tensors", len(group))
    is_extra = first.evidence.get("only_in") == "actual"  # not one of the reference's
    of_total = "" if is_extra or len(group) > total else f"{len(group)} of "
    count = f"{of_total}{words.pluralize(total if of_total else len(group), 'tensor')}"
    return GroupSummary(
        f"{saved}: {count}" if saved else count, cause(_for_group(group)), known, "tensors", _names(group)
    )


def _names(group: Sequence[Finding]) -> str:
    """Return the tensors of a group, each with the other tensor that its explanation names."""
    names = list(dict.fromkeys(map(_name, group)))
    if len(names) <= _MAX_NAMES:
        return ", ".join(names)
    return words.join_truncated(words.compact_names(names), _MAX_PATTERNS)


def _values(group: Sequence[Finding]) -> str:
    texts = [f"{finding.where['field']} {values(finding.evidence)}" for finding in group]
    return "; ".join(texts[:_MAX_PATTERNS]) + (
        f" and {len(texts) - _MAX_PATTERNS} more" if texts[_MAX_PATTERNS:] else ""
    )


def _name(finding: Finding) -> str:
    name, details = str(finding.where.get("parameter", "")), _details(finding)
    if "states" in finding.evidence:
        name = f"{name} {finding.where['field']}".strip()
    other = None if finding.cause == _EARLIER else next((key for key in _OTHER_NAMES if details.get(key)), None)
    return name if other is None else f"{name} {_OTHER_NAMES[other]} {details[other]}"


def group_by_explanation(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Return the findings on checkpoints, grouped by cause and explanation, the largest group first."""
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        if finding.check == CHECKPOINT_CHECK:
            is_state = "states" in finding.evidence  # its field is the kind of state
            moment = (
                is_state,
                *(finding.where.get(key) for key in ("phase", "step", *(() if is_state else ("field",)))),
            )
            details = _details(finding)
            named = "stands_as" in details, details.get("equals") if finding.cause == _EARLIER else None
            key = (
                finding.cause,
                "counted" in finding.evidence,
                *moment,
                *named,
                *(str(details.get(name)) for name in _GROUP_KEYS),
            )
            groups.setdefault(key, []).append(finding)
    return sorted(groups.values(), key=len, reverse=True)


def _details(finding: Finding) -> Details:
    return finding.evidence.get("story") or {}


def _for_group(group: Sequence[Finding]) -> Finding:
    """Return the first finding, without what is not the same for the whole group."""
    first = group[0]
    common = {
        key: value
        for key, value in _details(first).items()
        if all(_details(finding).get(key) == value for finding in group)
    }
    if "stands_as" in _details(first) and "stands_as" not in common:
        common["varies"] = "stands_as"
    return replace(first, evidence={**first.evidence, "story": common})


def amount(finding: Finding) -> str | None:
    """Return what differs and by how much, or None for what other phrases say."""
    evidence = finding.evidence
    if finding.check == CHECKPOINT_CHECK and finding.cause == Cause.REPLICA_DRIFT.slug:
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
    try:
        text = phrase(_details(finding)) if phrase is not None else None
    except KeyError:  # it varies within the group
        text = None
    return f"{finding.cause}: {text}" if text else causes.cause_text(finding.cause, None)


def _shard(details: Details) -> str:
    dim = _along_dim(details)
    if details.get("tp_rank") is None:
        start = f", from index {details['from']}" if "from" in details else ""
        return f"the tensor is a slice of the reference{dim}{start}"
    blocks = f", of each of the blocks of {details['blocks']}" if details.get("blocks") else ""
    return f"the tensor is TP rank {details['tp_rank']}'s slice of the reference{dim}, of {details['tp']} ranks{blocks}"


def _order(details: Details) -> str:
    order = details["order"] if "order" in details else details["from"]
    return f"the tensor holds the reference's shards {order}{_along_dim(details)}"


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


def _of_another_rank(details: Details) -> str | None:
    if "shape_shard" in details:
        return f"one rank's shard {details['shape_shard']} of {details['shape_whole']} is saved for all ranks"
    if "order" in details:
        return f"the ranks have the states of {details['order']}{_along_dim(details)}"
    if "sizes" in details:
        return f"shards of {details['sizes']} hold the states from {details['from']}{_along_dim(details)}"
    return f"one rank's states are saved for all{_along_dim(details)}"


def _exchanged(details: Details) -> str | None:
    if "partner" in details:
        return f"the tensor holds what belongs to {details['partner']}, which holds what belongs to it"
    rank = f" in the part of TP rank {details['tp_rank']} of {details['tp']}" if "tp_rank" in details else ""
    return f"the two matrices are in each other's place{_along_dim(details)}{rank}" if "distance" in details else None


def _rotary(details: Details) -> str:
    orders = {"half-split": "half a head apart", "interleaved": "next to each other"}
    actual = orders.pop(details["order"])
    (expected,) = orders.values()
    size = f" ({details['rotary_dim']} rows of each head)" if "rotary_dim" in details else ""
    return f"pairs of rotated rows are {actual}, those of the reference {expected}{size}"


def _offset(details: Details) -> str:
    constant = details["constant"]
    return f"the tensor is the reference {'plus' if constant > 0 else 'minus'} {abs(constant):.6g}"


def _along_dim(details: Details) -> str:
    return "" if details.get("dim") is None else f" along dim {details['dim']}"


def _tie(details: Details) -> str | None:
    partner = details.get("tied_with") or details.get("equals")
    names = partner if isinstance(partner, str) else ", ".join(partner or ())
    return f"the reference ties it with {names}" if names else None


def _renamed(details: Details) -> str | None:
    if details.get("stands_as"):
        return f"its bits are there under the name {details['stands_as']}"
    return "its bits are there under another name" if "varies" in details else None


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
    Cause.GATE_UP_EXCHANGED: _exchanged,
    Cause.KEY_VALUE_EXCHANGED: _exchanged,
    Cause.ROTARY_LAYOUT: _rotary,
    Cause.OFFSET_BY_CONSTANT: _offset,
    Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK: _of_another_rank,
    Cause.DTYPE_ROUNDED: _if_known("dtype", "the tensor is bitwise equal to the reference rounded to {}"),
    Cause.STALE_WEIGHT: _if_known("equals", "the tensor is bitwise equal to {}"),
    Cause.TENSOR_OF_ANOTHER_LAYER: _if_known("equals", "the tensor is bitwise equal to {}"),
    Cause.TENSOR_MISSING: _renamed,
    Cause.NOT_SHARDED: _if_known("copies", "the tensor is {} whole copies, concatenated"),
    Cause.BIT_FLIPPED: _if_known("bit", "bit {} of one element differs"),
    Cause.REPLICA_DRIFT: _if_known("ranks", "{}"),
    Cause.DUPLICATE_REDUCE: _if_known("factor", "the tensor is bitwise equal to the reference times {}"),
}
"""The phrases of checkpoints; a cause without one, or without its evidence, has the sentence of `core/causes.py`."""
