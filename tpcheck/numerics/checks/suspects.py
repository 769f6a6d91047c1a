"""Turns the difference of a tensor into a suspect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpcheck.numerics.differences import Difference
from tpcheck.numerics.evidence import Evidence, Kind, Suspect


def tensor_suspect(
    evidence: Evidence,
    difference: Difference,
    *,
    check: str,
    kind: Kind,
    where: Mapping[str, Any],
    expected: Any,
    actual_parts: Sequence[Any],
    expected_parts: Sequence[Any],
    is_replicated: bool,
    details: Mapping[str, Any] | None = None,
) -> Suspect:
    """Return the suspect for a calibrated or exact comparison of one tensor.

    Exact comparisons (nothing allowed) count the elements that differ, calibrated ones give a relative error.
    """
    is_exact = difference.allowed == 0
    where = {**where, "ranks": evidence.ranks(difference.wrong_tp_ranks())}
    if evidence.topology.dp > 1:
        where["dp_rank"] = evidence.dp_rank
    numbers: dict[str, Any] = {
        "largest": difference.largest,
        "largest_at": list(difference.largest_at),
        "dtype": evidence.dtype,
    }
    if is_exact:
        numbers |= {"count_differing": difference.count_differing, "count_total": expected.numel()}
    else:
        numbers |= {"replays": evidence.tolerance.num_replays}
    return Suspect(
        check=check,
        kind=kind,
        where=where,
        observed=float(difference.count_differing) if is_exact else difference.relative,
        allowed=0.0 if is_exact else difference.relative_allowed,
        evidence={**numbers, **(details or {})},
        expected=expected,
        actual_parts=tuple(actual_parts),
        expected_parts=tuple(expected_parts),
        is_replicated=is_replicated,
        allowed_error=difference.allowed,
        num_replicas=evidence.topology.dp,
    )
