"""In which of their namings two checkpoints fit best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tpcheck.adapters import Checkpoint, NamedOtherwiseWhenSaved
from tpcheck.verification.checkpoint.naming import Matching, match_names


def best_reading(actual: Checkpoint, expected: Checkpoint) -> tuple[Checkpoint, Checkpoint, Matching]:
    """Return both sides and how their names match; a live model as its library saves it, where that fits better."""
    plain = match_names(actual.names(), expected.names())
    if not plain.missing and not plain.unexpected:
        return actual, expected, plain
    readings = [(actual, expected, plain), *_as_saved(actual, expected)]
    return min(readings, key=lambda reading: len(reading[2].missing) + len(reading[2].unexpected))


def _as_saved(actual: Checkpoint, expected: Checkpoint) -> Iterator[tuple[Checkpoint, Checkpoint, Matching]]:
    for side, checkpoint in (("actual", actual), ("the reference", expected)):
        saved = checkpoint.as_saved() if isinstance(checkpoint, NamedOtherwiseWhenSaved) else None
        if saved is not None:
            ours, theirs = (saved, expected) if side == "actual" else (actual, saved)
            matching = match_names(ours.names(), theirs.names())
            words = (*matching.renamed, f"{side} is read as its library saves it")
            yield ours, theirs, replace(matching, renamed=words)
