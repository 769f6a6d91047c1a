"""Why replicas differ."""

from __future__ import annotations

from tpcheck.causes.explanation import Explanation, Test, sum_of_ranks
from tpcheck.records import Suspect


def drift(suspect: Suspect) -> Explanation | None:
    """Replicas that were equal at the start are not any more, without their gradients being told apart."""
    told_otherwise = "gradients" in suspect.evidence or "differed_at_start" in suspect.evidence
    return None if suspect.where.get("phase") == "start" or told_otherwise else Explanation("replica_drift", 0.0)


TESTS: tuple[Test, ...] = (sum_of_ranks("partial_gradient_on_replica"), drift)
