"""Whether batches that differ hold the same samples: other padding, another order."""

from __future__ import annotations

from collections.abc import Sequence

from tpcheck.records.batch import BatchFacts


def same_tokens(facts: Sequence[BatchFacts], differing: Sequence[str]) -> bool:
    """Tell whether all that differs is padding; see `tpcheck.collect.contents` for what each rank tells."""
    return _agree(facts, differing, "unpadded") or _agree(facts, differing, "kept")


def same_rows(facts: Sequence[BatchFacts], differing: Sequence[str]) -> bool:
    """Tell whether each leaf that differs has the same rows on all ranks, in some order."""
    return _agree(facts, differing, "rows")


def _agree(facts: Sequence[BatchFacts], differing: Sequence[str], key: str) -> bool:
    if not differing:
        return False
    for path in differing:
        digests = {rank.loader.get("contents", {}).get(path, {}).get(key) for rank in facts}
        if len(digests) != 1 or None in digests:
            return False
    return True
