"""Compares two checkpoints: names, shapes, dtypes, ties, then bits; and tells what happened to what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from tpcheck.adapters import Checkpoint
from tpcheck.causes.checkpoint import Case, Story, Surroundings, explain_tensor
from tpcheck.causes.checkpoint.advice import ADVICE
from tpcheck.checks import CHECKPOINT_CHECK
from tpcheck.compare.bits import BitComparer
from tpcheck.compare.elements import ElementDifference, element_difference
from tpcheck.compare.stored import Stored
from tpcheck.records import Coverage, Finding
from tpcheck.verification.checkpoint.differing import Pair, Progress, differing, in_parallel
from tpcheck.verification.checkpoint.reading import best_reading
from tpcheck.verification.checkpoint.ties import Loose, loose_names


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it.

    Attributes:
        findings: One for each tensor that is not the reference's, in the reference's order.
        coverage: How many tensors could be compared.
        renamed: How names were read, in words.
    """

    findings: tuple[Finding, ...]
    coverage: Coverage
    renamed: tuple[str, ...]


def compare_checkpoints(
    actual: Checkpoint,
    expected: Checkpoint,
    *,
    cast: torch.dtype | None = None,
    actual_cast: torch.dtype | None = None,
    earlier: Mapping[str, Checkpoint] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare every tensor to the bit.

    Args:
        cast: Floating point values of `expected` are rounded to this dtype first: a cast that was meant.
        actual_cast: The same for `actual`, which may hold master weights of higher precision.
        earlier: Checkpoints of earlier steps, with the names of `expected`, to tell weights that were not updated.
        progress: Is told how many bytes of how many are compared.

    Raises:
        CheckpointError: A file does not hold what it should.
    """
    actual, expected, matching = best_reading(actual, expected)
    pairs = [
        Pair(Stored(actual, ours, actual_cast), Stored(expected, theirs, cast))
        for theirs, ours in matching.actual_of.items()
    ]
    alike = [pair for pair in pairs if pair.actual.shape == pair.expected.shape and _one_dtype(pair)]
    agreeing = {pair.expected.name for pair in alike} - {pair.expected.name for pair in differing(alike, progress)}
    with BitComparer() as comparer:
        surroundings = Surroundings(expected, earlier or {}, comparer)
        told = _told([pair for pair in pairs if pair.expected.name not in agreeing], surroundings)
    untied = dict(_tied_partners(expected, agreeing))
    elsewhere = {*actual.unread, *expected.unread, *actual.torn, *expected.torn}  # there, and not to be read
    loose = [one for one in loose_names(actual, expected, matching, cast) if one.name not in elsewhere]
    findings = [
        *(_torn(name, actual.torn[name]) for name in expected.names() if name in actual.torn),
        *(_finding(pair, *told[pair.expected.name], untied) for pair in pairs if pair.expected.name in told),
        *map(_loose, loose),
    ]
    number = {"count_tensors": len(expected.names())}
    for checkpoint in (actual, expected, *(earlier or {}).values()):
        checkpoint.require_unchanged()
    found = tuple(replace(finding, evidence={**finding.evidence, **number}) for finding in findings)
    return Comparison(found, _coverage(actual, expected, loose), matching.renamed)


def _one_dtype(pair: Pair) -> bool:
    return pair.actual.dtype == pair.expected.dtype


def _told(
    pairs: Sequence[Pair], surroundings: Surroundings
) -> dict[str, tuple[ElementDifference | None, Story | None]]:
    """Return which elements of each tensor differ, and what happened to it, by the reference's name."""

    def tell(pair: Pair) -> tuple[ElementDifference | None, Story | None]:
        same_shape = pair.actual.shape == pair.expected.shape
        found = element_difference(pair.actual, pair.expected) if same_shape else None
        if not _one_dtype(pair):
            return found, _of_dtype(pair, surroundings)
        return found, explain_tensor(Case(pair.actual, pair.expected, found, surroundings))

    return {pair.expected.name: told for pair, told in in_parallel(tell, iter(pairs))}


def _of_dtype(pair: Pair, surroundings: Surroundings) -> Story | None:
    """Tell a tensor of another dtype: the reference's values, rounded to it, or else what happens to those."""
    actual, own = pair.actual, pair.actual.dtype
    expected = Stored(pair.expected.checkpoint, pair.expected.name, own)
    if expected.dtype != own:
        return None  # an integer where a floating point number should be, or the other way round
    if actual.shape != expected.shape:
        return explain_tensor(Case(actual, expected, None, surroundings))
    rounded = element_difference(actual, expected)
    if rounded is not None:
        return explain_tensor(Case(actual, expected, rounded, surroundings))
    changes = element_difference(actual, pair.expected) is not None
    return Story("dtype_rounded", {"dtype": str(own).removeprefix("torch.")}) if changes else None


def _finding(pair: Pair, found: ElementDifference | None, story: Story | None, untied: Mapping[str, str]) -> Finding:
    actual, expected = pair.actual, pair.expected
    where: dict[str, Any] = {"parameter": expected.name}
    evidence: dict[str, Any] = {}
    if actual.name != expected.name:
        evidence["actual_name"] = actual.name
    if actual.shape != expected.shape:
        evidence |= {"shape_actual": list(actual.shape), "shape_expected": list(expected.shape)}
    if not _one_dtype(pair):
        evidence |= {"dtype_actual": _short(actual.dtype), "dtype_expected": _short(expected.dtype)}
        evidence["same_values"] = found is None and actual.shape == expected.shape
    if found is not None:
        where["index"] = list(found.first)
        evidence |= {
            "count_differing": found.count,
            "count_total": found.total,
            "actual": _shown(found.actual),
            "expected": _shown(found.expected),
            "largest": found.largest,
            "largest_at": list(found.largest_at),
        }
    if story is None and expected.name in untied:
        story = Story("tied_weight_untied", {"tied_with": untied[expected.name]})
    if story is not None:
        evidence |= {"story": dict(story.details), "advice": ADVICE.get(story.cause)}
    observed = float(found.count if found is not None else max(1, expected.numel))
    return Finding(CHECKPOINT_CHECK, where, observed, 0.0, story.cause if story else None, evidence)


def _loose(one: Loose) -> Finding:
    side = "actual" if one.cause in ("tensor_unexpected", "tied_weight_untied") else "reference"
    evidence = {"only_in": side, "story": dict(one.evidence), "advice": ADVICE.get(one.cause)}
    return Finding(CHECKPOINT_CHECK, {"parameter": one.name}, 1.0, 0.0, one.cause, evidence)


def _torn(name: str, ranks: str) -> Finding:
    evidence = {"story": {"ranks": ranks}, "advice": ADVICE["replica_drift"]}
    return Finding(CHECKPOINT_CHECK, {"parameter": name}, 1.0, 0.0, "replica_drift", evidence)


def _coverage(actual: Checkpoint, expected: Checkpoint, loose: Sequence[Loose]) -> Coverage:
    """Return how many of the reference's tensors met a counterpart; a tie that is stored once met its own."""
    missed = {f"{name} of actual": why for name, why in actual.unread.items()}
    missed |= {f"{name} of the reference": why for name, why in (*expected.unread.items(), *expected.torn.items())}
    names = frozenset(expected.names())
    alone = {one.name for one in loose} | set(actual.unread)
    return Coverage(len(names - alone), len(names | actual.unread.keys() | expected.unread.keys()), missed)


def _tied_partners(expected: Checkpoint, right: Set[str]) -> Iterator[tuple[str, str]]:
    """Yield every name that the reference ties to one that is right, with that one."""
    for tie in expected.ties:
        for name in tie:
            partner = next((other for other in sorted(tie) if other != name and other in right), None)
            if partner is not None:
                yield name, partner


def _shown(value: Any) -> Any:
    return str(value) if isinstance(value, complex) else value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
