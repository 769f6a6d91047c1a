"""Differences between batches, as phrases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.core.findings import Finding
from tpcheck.report import words

_RANKS_SHOWN = 4
# Evidence that the phrases below include.
PHRASED = frozenset(
    {"differs", "by_rank", "missing_on", "values", "first_sample", "samples_differing", "samples_total"}
    | {"batches", "ended", "replicas", "order"}
)


def amount(finding: Finding) -> str | None:
    """Return what differs and by how much, or None for a finding that is not about batches."""
    evidence = finding.evidence
    differs = evidence.get("differs")
    if finding.check == "batches_differ_across_dp" and differs is None:
        return f"{words.pluralize(finding.observed, 'sample')} in common, in {evidence.get('order', 'some order')}"
    if differs == "length":
        return "batches: " + ", ".join(
            f"{count}{'' if name in evidence['ended'] else ' or more'} on {name}"
            for name, count in evidence["batches"].items()
        )
    if differs == "structure":
        return f"missing on {words.ranks(evidence['missing_on'])}; differs"
    if differs in ("type", "dtype", "shape", "device"):
        return f"{differs} {_by_rank(evidence['by_rank'])}; differs"
    return _bits(evidence) if differs == "bits" else None


def values(evidence: Mapping[str, Any]) -> str:
    """Return the values of the first element that differs."""
    return _by_rank(evidence.get("values") or {})


def _bits(evidence: Mapping[str, Any]) -> str:
    if "count_total" not in evidence:
        return "differs"
    number, total = evidence["count_differing"], evidence["count_total"]
    text = f"{number} of {words.pluralize(total, 'element')} {'differs' if number == 1 else 'differ'}"
    if evidence.get("samples_total", 1) == 1:
        return text
    return (
        f"{text}, in {evidence['samples_differing']} of {words.pluralize(evidence['samples_total'], 'sample')}, first"
    )


def _by_rank(values: Mapping[str, Any]) -> str:
    return words.join_truncated([f"{_value(value)} on {name}" for name, value in values.items()], _RANKS_SHOWN)


def _value(value: Any) -> str:
    return str(list(value)) if isinstance(value, (tuple, list)) else str(value)
