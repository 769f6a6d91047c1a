"""Holds what a module made against what its own inputs give: a mistake behind another mistake shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tpcheck.checks.suspects import tensor_suspect
from tpcheck.compare import frobenius
from tpcheck.compare.difference import Difference, difference, measured
from tpcheck.records import Evidence, Suspect
from tpcheck.records.suspect import Kind

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
