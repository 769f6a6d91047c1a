"""Why an activation is wrong although its module was given the right inputs."""

from __future__ import annotations

from tpcheck.causes.explanation import Explanation, Test, num_tp, scaled, sum_of_ranks
from tpcheck.records import Suspect


def fused(suspect: Suspect) -> Explanation | None:
    """The module before was cut block by block, and its output is then read in another order."""
    error = suspect.evidence.get("fused_blocks_error")
    return None if error is None else Explanation("fused_blocks_interleaved", error)


TESTS: tuple[Test, ...] = (
    fused,
    sum_of_ranks("missing_reduce"),
    scaled("duplicate_reduce", num_tp),
    scaled("mean_instead_of_sum", lambda suspect: 1 / num_tp(suspect)),
)
