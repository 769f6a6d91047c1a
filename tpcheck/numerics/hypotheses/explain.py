"""Tries every cause on a suspect and keeps the first that explains it exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tpcheck.core.causes import Cause, Explanation, first_explanation
from tpcheck.numerics.evidence import Kind, Suspect
from tpcheck.numerics.hypotheses import activations, gradients, updates, weights
from tpcheck.numerics.hypotheses.explanation import Test, loses_numbers, not_finite, sum_of_ranks


def wrong_group(suspect: Suspect) -> Explanation | None:
    return Explanation(Cause.WRONG_GROUP, 0.0)


def no_shard(suspect: Suspect) -> Explanation | None:
    return Explanation(Cause.NOT_SHARDED, 0.0) if "parameter" not in suspect.where else None


def lost_shard(suspect: Suspect) -> Explanation | None:
    """Some ranks hold nothing, and what is lost would be shards as long as those of the others."""
    size, shards = suspect.evidence.get("size", 0), list(suspect.evidence.get("shard_sizes", ()))
    empty, held = shards.count(0), [shard for shard in shards if shard]
    is_lost = bool(held) and empty > 0 and sum(held) < size <= sum(held) + empty * max(held)
    return Explanation(Cause.SHARD_MISSING, 0.0) if is_lost else None


def lost_remainder(suspect: Suspect) -> Explanation | None:
    """All shards are as long as the whole divided by the number of ranks and rounded down, which leaves a remainder."""
    size, shards = suspect.evidence.get("size", 0), list(suspect.evidence.get("shard_sizes", ()))
    is_lost = bool(shards) and set(shards) == {size // len(shards)} and size % len(shards) > 0
    return Explanation(Cause.WRONG_SHARD_BOUNDARY, 0.0) if is_lost else None


OF_GROUPS: tuple[Test, ...] = (wrong_group,)
OF_SHARDING: tuple[Test, ...] = (no_shard, lost_shard, lost_remainder)


def drift(suspect: Suspect) -> Explanation | None:
    """Replicas that were equal at the start are not any more, without their gradients being told apart."""
    told_otherwise = "gradients" in suspect.evidence or "differed_at_start" in suspect.evidence
    return None if suspect.where.get("phase") == "start" or told_otherwise else Explanation(Cause.REPLICA_DRIFT, 0.0)


REPLICA_TESTS: tuple[Test, ...] = (sum_of_ranks(Cause.PARTIAL_GRADIENT_ON_REPLICA), drift)


def explain(suspect: Suspect) -> Explanation | None:
    """Return the first cause whose test holds, or None where none does."""
    return first_explanation(suspect, applicable(suspect))


def applicable(suspect: Suspect) -> tuple[Test, ...]:
    """Return the tests that a suspect is put to, in order."""
    return (not_finite,) if suspect.kind in _COMPUTED and loses_numbers(suspect) else TESTS[suspect.kind]


TESTS: Mapping[Kind, tuple[Test, ...]] = {
    "activation": activations.TESTS,
    "input_gradient": gradients.INPUT_GRADIENT_TESTS,
    "gradient": gradients.GRADIENT_TESTS,
    "weight": weights.TESTS,
    "update": updates.UPDATE_TESTS,
    "norm": updates.NORM_TESTS,
    "replica": REPLICA_TESTS,
    "group": OF_GROUPS,
    "sharding": OF_SHARDING,
}

_COMPUTED: Collection[Kind] = ("activation", "input_gradient", "gradient", "update")  # weights are told by their bits
