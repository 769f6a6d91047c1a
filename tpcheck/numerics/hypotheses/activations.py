"""Why an activation is wrong although its module was given the right inputs."""

from __future__ import annotations

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.explanation import (
    Test,
    dtype_rounded,
    num_dp,
    num_tp,
    one_of_hypotheses,
    same_shapes,
    scaled,
    scaled_on_some,
    sum_of_ranks,
)
from tpcheck.numerics.hypotheses.moved import heads_moved, shards_moved

_LEAST_ELEMENTS = 8  # fewer zeros may be anything


def fused(suspect: Suspect) -> Explanation | None:
    """The module before was cut block by block, and its output is then read in another order."""
    error = suspect.evidence.get("fused_blocks_error")
    return None if error is None else Explanation(Cause.FUSED_BLOCKS_INTERLEAVED, error)


def all_zero(suspect: Suspect) -> Explanation | None:
    """Every wrong element is zero, and there are more than a few."""
    if not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    wrong = [_wrong(part, expected, suspect.allowed_error) for part, expected in _pairs(suspect)]
    actual = torch.cat([part[where] for (part, _), where in zip(_pairs(suspect), wrong, strict=True)])
    return Explanation(Cause.ALL_ZERO, 0.0) if actual.numel() >= _LEAST_ELEMENTS and not bool(actual.any()) else None


def wrong_group(suspect: Suspect) -> Explanation | None:
    """The module issued the collectives that its like issues, over other ranks."""
    issued, expected = (suspect.evidence.get(key, ()) for key in ("collectives", "collectives_expected"))
    same_names = [one["name"] for one in issued] == [one["name"] for one in expected]
    return Explanation(Cause.WRONG_GROUP, 0.0) if issued and same_names else None


def terms_of_ranks(suspect: Suspect) -> Explanation | None:
    """The ranks' parts are terms of the expected one; equal ones were divided by their number instead."""
    found = sum_of_ranks(Cause.MISSING_REDUCE)(suspect)
    if found is None:
        return None
    return scaled(Cause.MEAN_INSTEAD_OF_SUM, lambda suspect: 1 / num_tp(suspect))(suspect) or found


def _pairs(suspect: Suspect) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(suspect.parts, suspect.expected_parts, strict=False))


def _wrong(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> torch.Tensor:
    return ~((actual.double() - expected.double()).abs() <= allowed)


TESTS: tuple[Test, ...] = (
    fused,
    terms_of_ranks,
    scaled(Cause.DUPLICATE_REDUCE, num_tp),
    scaled(Cause.MEAN_INSTEAD_OF_SUM, lambda suspect: 1 / num_tp(suspect)),
    one_of_hypotheses,
    scaled_on_some(Cause.DUPLICATE_REDUCE, num_tp),
    scaled_on_some(Cause.MEAN_INSTEAD_OF_SUM, lambda suspect: 1 / num_tp(suspect)),
    heads_moved,
    shards_moved,
    all_zero,
    dtype_rounded,
    scaled(Cause.SUM_INSTEAD_OF_MEAN, num_dp),
    wrong_group,
)
