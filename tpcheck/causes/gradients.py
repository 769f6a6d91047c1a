"""Why the gradient of a parameter is wrong."""

from __future__ import annotations

from tpcheck.causes.explanation import Explanation, Test, num_dp, num_tp, scaled, sum_of_ranks
from tpcheck.records import Suspect


def missing(suspect: Suspect) -> Explanation | None:
    if "missing_on_ranks" in suspect.evidence:
        return Explanation("gradient_missing", 0.0)
    return None


TESTS: tuple[Test, ...] = (
    missing,
    sum_of_ranks("partial_gradient_on_replica"),
    scaled("gradient_scaled", num_tp),
    scaled("gradient_scaled", lambda suspect: 1 / num_tp(suspect)),
    scaled("sum_instead_of_mean", num_dp),
    scaled("mean_instead_of_sum", lambda suspect: 1 / num_dp(suspect)),
)
