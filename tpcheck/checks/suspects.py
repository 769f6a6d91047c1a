"""Turns a difference of tensors into a suspect: where, how much, and the tensors a cause can be tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpcheck.compare import Difference
from tpcheck.records import Evidence, Suspect
from tpcheck.records.suspect import Kind


def tensor_suspect(
    evidence: Evidence,
    found: Difference,
    *,
    check: str,
    kind: Kind,
    where: Mapping[str, Any],
    expected: Any,
    parts: Sequence[Any],
    expected_parts: Sequence[Any],
    replicated: bool,
    details: Mapping[str, Any] | None = None,
) -> Suspect:
    """Return the suspect for a calibrated or exact comparison of one tensor.

    Exact comparisons (nothing allowed) are told in differing elements, calibrated ones in relative error.
    """
    exact = found.allowed == 0
    place = {**where, "ranks": evidence.ranks(found.wrong_tp_ranks())}
    if evidence.topology.dp > 1:
        place["dp_rank"] = evidence.dp_rank
    numbers: dict[str, Any] = {"largest": found.largest, "largest_at": list(found.largest_at), "dtype": evidence.dtype}
    if exact:
        numbers |= {"count_differing": found.count_differing, "count_total": expected.numel()}
    else:
        numbers |= {"replays": evidence.tolerance.num_replays}
    return Suspect(
        check=check,
        kind=kind,
        where=place,
        observed=float(found.count_differing) if exact else found.relative,
        allowed=0.0 if exact else found.relative_allowed,
        evidence={**numbers, **(details or {})},
        expected=expected,
        parts=tuple(parts),
        expected_parts=tuple(expected_parts),
        replicated=replicated,
        allowed_error=found.allowed,
        num_replicas=evidence.topology.dp,
    )
