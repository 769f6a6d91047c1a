"""Whether batches that differ hold the same samples: other padding, another order."""

from __future__ import annotations

from collections.abc import Sequence

from tpcheck.records.batch import BatchFacts


def same_tokens(facts: Sequence[BatchFacts], differing: Sequence[str]) -> bool:
    """Tell whether all that differs is padding; see `tpcheck.collect.contents` for what each rank tells."""
    return _agree(facts, differing, "unpadded", "kept")


def same_rows(facts: Sequence[BatchFacts], differing: Sequence[str]) -> bool:
    """Tell whether each leaf that differs has the same rows on all ranks, in some order."""
    return _agree(facts, differing, "rows")


def _agree(facts: Sequence[BatchFacts], differing: Sequence[str], *keys: str) -> bool:
    """Tell whether all ranks have one digest of each leaf under one of the keys."""
    return bool(differing) and all(any(_one(facts, path, key) for key in keys) for path in differing)


def _one(facts: Sequence[BatchFacts], path: str, key: str) -> bool:
    digests = {rank.loader.get("contents", {}).get(path, {}).get(key) for rank in facts}
    return len(digests) == 1 and None not in digests
