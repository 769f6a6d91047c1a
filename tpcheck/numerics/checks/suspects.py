"""Turns a difference of tensors, or of a tensor and what its module's own inputs give, into a suspect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tpcheck.numerics.differences import Difference, difference, frobenius, measured
from tpcheck.numerics.evidence import Evidence, Kind, Suspect


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


_ROUNDINGS = 10.0  # rounding is measured around the reference's inputs, which these are not


def unlike_own(
    evidence: Evidence,
    parts: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    found: Difference,
    *,
    check: str,
    kind: Kind,
    where: Mapping[str, Any],
    replicated: bool,
    details: Mapping[str, Any] | None = None,
) -> Suspect | None:
    """Return the suspect for ranks' parts that are not what their own inputs give; None where they are.

    Args:
        own: What the inputs give, one tensor for each part.
        found: How far the parts are from the reference's.
    """
    size = frobenius(torch.cat([part.reshape(-1) for part in own]))
    allowed = _ROUNDINGS * max(1.0, size / found.expected_norm if found.expected_norm else 1.0) * found.allowed
    gaps = [difference(part, right) for part, right in zip(parts, own, strict=True)]
    apart = measured(gaps, size, allowed, replicated=replicated)
    if apart.agrees:
        return None
    return tensor_suspect(
        evidence,
        apart,
        check=check,
        kind=kind,
        where=where,
        expected=own[0] if replicated else None,
        parts=parts,
        expected_parts=own,
        replicated=replicated,
        details={
            "inputs_agree": False,
            "note": "compared with what its own inputs and weights give",
            **(details or {}),
        },
    )
