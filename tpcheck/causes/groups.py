"""Why a group or the sharding as a whole is wrong."""

from __future__ import annotations

from tpcheck.causes.explanation import Explanation, Test
from tpcheck.records import Suspect


def wrong_group(suspect: Suspect) -> Explanation | None:
    return Explanation("wrong_group", 0.0)


def no_shard(suspect: Suspect) -> Explanation | None:
    return Explanation("not_sharded", 0.0) if "parameter" not in suspect.where else None


OF_GROUPS: tuple[Test, ...] = (wrong_group,)
OF_SHARDING: tuple[Test, ...] = (no_shard,)
