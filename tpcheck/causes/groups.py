"""Why a group or the sharding as a whole is wrong."""

from __future__ import annotations

from tpcheck.causes.explanation import Explanation, Test
from tpcheck.records import Suspect


def wrong_group(suspect: Suspect) -> Explanation | None:
    return Explanation("wrong_group", 0.0)


def no_shard(suspect: Suspect) -> Explanation | None:
    return Explanation("not_sharded", 0.0) if "parameter" not in suspect.where else None


def lost_shard(suspect: Suspect) -> Explanation | None:
    """Some ranks hold nothing, and what is lost would be shards as long as those of the others."""
    size, shards = suspect.evidence.get("size", 0), list(suspect.evidence.get("shard_sizes", ()))
    empty, held = shards.count(0), [shard for shard in shards if shard]
    is_lost = bool(held) and empty > 0 and sum(held) < size <= sum(held) + empty * max(held)
    return Explanation("shard_missing", 0.0) if is_lost else None


def lost_remainder(suspect: Suspect) -> Explanation | None:
    """All shards are as long as the whole divided by the number of ranks and rounded down, which leaves a remainder."""
    size, shards = suspect.evidence.get("size", 0), list(suspect.evidence.get("shard_sizes", ()))
    is_lost = bool(shards) and set(shards) == {size // len(shards)} and size % len(shards) > 0
    return Explanation("wrong_shard_boundary", 0.0) if is_lost else None


OF_GROUPS: tuple[Test, ...] = (wrong_group,)
OF_SHARDING: tuple[Test, ...] = (no_shard, lost_shard, lost_remainder)
