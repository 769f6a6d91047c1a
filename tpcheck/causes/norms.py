"""Why the norm that clips is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from tpcheck.causes.explanation import EXACT, Explanation, Test
from tpcheck.records import Suspect


def norm_is_local(suspect: Suspect) -> Explanation | None:
    """Every rank's norm is that of the gradients of one rank alone, or of its shards alone."""
    names = ("norm_of_each_rank_alone", "norm_of_each_ranks_shards")
    alone = [norm for name in names for norm in suspect.evidence.get(name, ())]
    return _norms_hold("norm_is_local", suspect, alone)


def norm_counts_replicas(suspect: Suspect) -> Explanation | None:
    """Every rank's norm is that of all gradients with those of replicated parameters counted once for each rank."""
    counted = suspect.evidence.get("norm_with_replicas_counted")
    return _norms_hold("norm_counts_replicas", suspect, () if counted is None else (counted,))


def _norms_hold(slug: str, suspect: Suspect, explanations: Sequence[float]) -> Explanation | None:
    if not explanations:
        return None
    errors = [min(abs(norm - explained) for explained in explanations) for norm in suspect.parts]
    remaining = max(errors) / suspect.expected if suspect.expected else max(errors)
    return Explanation(slug, remaining) if remaining <= EXACT * suspect.observed else None


TESTS: tuple[Test, ...] = (norm_is_local, norm_counts_replicas)
