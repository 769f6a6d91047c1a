"""Which name of one checkpoint stands for which of the other: equal names, usual changes of them, ties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, RenamedWhenSaved
from tpcheck.core.causes import Cause
from tpcheck.numerics.exact.stored import BitComparer, Stored

# What wraps a model and puts a part into the names of its tensors: torch.compile, FSDP, activation checkpointing, PEFT.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")
# Of DistributedDataParallel and DeepSpeed, PEFT, and of models that hold a headless model of transformers.
_PREFIXES = ("module.", "base_model.model.", "model.", "transformer.", "_forward_module.")
# LayerNorm of checkpoints that were converted from TensorFlow.
_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}

Rename = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Matching:
    """Names side by side.

    Attributes:
        actual_of: The actual name that stands for each expected one.
        missing: Expected names without an actual one.
        unexpected: Actual names without an expected one.
        renamed: What had to be changed, in words; nothing where names are equal.
    """

    actual_of: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    renamed: tuple[str, ...] = ()


def match_names(actual: Sequence[str], expected: Sequence[str]) -> Matching:
    """Return the matching that pairs the most names, with the fewest changes."""
    targets = frozenset(expected)
    best = max(_readings(actual, expected), key=lambda reading: (reading.pairs(actual, targets), -len(reading.words)))
    plain = Counter(best.actual(name) for name in actual)
    ours = {best.actual(name): name for name in actual if plain[best.actual(name)] == 1}
    actual_of = {name: ours[best.expected(name)] for name in expected if best.expected(name) in ours}
    used = frozenset(actual_of.values())
    return Matching(
        actual_of=actual_of,
        missing=tuple(name for name in expected if name not in actual_of),
        unexpected=tuple(name for name in actual if name not in used),
        renamed=best.words,
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    """Names of both sides under one set of changes."""

    actual: Rename
    expected: Rename
    words: tuple[str, ...] = ()

    def pairs(self, actual: Iterable[str], expected: Iterable[str]) -> int:
        return len({self.actual(name) for name in actual} & {self.expected(name) for name in expected})


def _readings(actual: Sequence[str], expected: Sequence[str]) -> Iterator[_Reading]:
    ours, theirs = _unwrapping(actual), _unwrapping(expected)
    words = (*_unwrapped("actual", actual, ours), *_unwrapped("reference", expected, theirs))
    yield _Reading(_same, _same)
    yield _Reading(ours, theirs, words)
    shown_ours, shown_theirs = [ours(name) for name in actual], [theirs(name) for name in expected]
    for prefix in _prefixes(shown_ours, frozenset(shown_theirs)):
        yield _Reading(_chain(ours, _without(prefix)), theirs, (*words, f"names of actual carry the prefix {prefix!r}"))
    for prefix in _prefixes(shown_theirs, frozenset(shown_ours)):
        told = f"names of the reference carry the prefix {prefix!r}"
        yield _Reading(ours, _chain(theirs, _without(prefix)), (*words, told))


def _prefixes(names: Sequence[str], others: frozenset[str]) -> Iterator[str]:
    """Yield prefixes whose removal makes names equal to others: usual ones, and one that most names share."""
    yield from (prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names))
    ends = Counter(name.removesuffix(other) for name in names for other in _tails(name) if other in others)
    often = [prefix for prefix, number in ends.most_common(4) if 2 * number > len(names)]
    yield from (prefix for prefix in often if prefix not in _PREFIXES)


def _tails(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(1, len(parts)))


def _unwrapping(names: Sequence[str]) -> Rename:
    present = [part for part in _WRAPPERS if any(part in name for name in names)]
    changes: list[Rename] = [_dropping(part) for part in present]
    if any(name.endswith(tuple(_ENDINGS)) for name in names):
        changes.append(_modern_ending)
    return _chain(*changes)


def _unwrapped(side: str, names: Sequence[str], rename: Rename) -> Iterator[str]:
    changed = sum(rename(name) != name for name in names)
    if changed:
        example = next(name for name in names if rename(name) != name)
        shown = f"{example!r} as {rename(example)!r}"
        yield f"{changed} names of {side} are read without what wraps the model, such as {shown}"


def _same(name: str) -> str:
    return name


def _chain(*changes: Rename) -> Rename:
    return lambda name: reduce(lambda so_far, change: change(so_far), changes, name)


def _dropping(part: str) -> Rename:
    return lambda name: name.replace(part, "")


def _without(prefix: str) -> Rename:
    return lambda name: name.removeprefix(prefix)


def _modern_ending(name: str) -> str:
    for old, new in _ENDINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def best_reading(actual: Checkpoint, expected: Checkpoint) -> tuple[Checkpoint, Checkpoint, Matching]:
    """Return both sides and how their names match; a live model as its library saves it, where that fits better."""
    plain = match_names(actual.names(), expected.names())
    if not plain.missing and not plain.unexpected:
        return actual, expected, plain
    readings = [(actual, expected, plain), *_as_saved(actual, expected)]
    return min(readings, key=lambda reading: len(reading[2].missing) + len(reading[2].unexpected))


def _as_saved(actual: Checkpoint, expected: Checkpoint) -> Iterator[tuple[Checkpoint, Checkpoint, Matching]]:
    for side, checkpoint in (("actual", actual), ("the reference", expected)):
        saved = checkpoint.as_saved() if isinstance(checkpoint, RenamedWhenSaved) else None
        if saved is not None:
            ours, theirs = (saved, expected) if side == "actual" else (actual, saved)
            matching = match_names(ours.names(), theirs.names())
            words = (*matching.renamed, f"{side} is read as its library saves it")
            yield ours, theirs, replace(matching, renamed=words)


@dataclass(frozen=True, slots=True)
class Loose:
    """A name that only one side has.

    Attributes:
        name: That name.
        cause: What it means.
        evidence: Which tensor it belongs to, where one is found.
    """

    name: str
    cause: Cause
    evidence: Mapping[str, Any] = field(default_factory=dict)


def loose_names(
    actual: Checkpoint, expected: Checkpoint, matching: Matching, cast: torch.dtype | None = None
) -> tuple[Loose, ...]:
    """Return the names that only one side has, but for ties that are stored once on one side and twice on the other."""
    with BitComparer() as comparer:
        sides = _Sides(actual, expected, matching, cast, comparer)
        missing = [found for name in matching.missing if (found := sides.missing(name)) is not None]
        renamed = {one.evidence.get("stands_as") for one in missing}
        unexpected = [
            found
            for name in matching.unexpected
            if name not in renamed and (found := sides.unexpected(name)) is not None
        ]
    return (*missing, *unexpected)


@dataclass(frozen=True, slots=True)
class _Sides:
    actual: Checkpoint
    expected: Checkpoint
    matching: Matching
    cast: torch.dtype | None
    comparer: BitComparer

    def missing(self, name: str) -> Loose | None:
        declared = _tied_with(self.expected, name)
        if any(other in self.matching.actual_of for other in declared):
            return self._stored_once(name, next(other for other in declared if other in self.matching.actual_of))
        if declared:
            return Loose(name, Cause.TIED_WEIGHT_DROPPED, {"tied_with": sorted(declared)})
        twin = self._equal_to(Stored(self.expected, name), self.expected, self.matching.actual_of)
        if twin is not None:
            return self._stored_once(name, twin) if _ties(self.actual) else Loose(
                name, Cause.TIED_WEIGHT_DROPPED, {"equals": twin}
            )  # fmt: skip
        other_name = self._equal_to(Stored(self.expected, name, self.cast), self.actual, self.matching.unexpected)
        return Loose(name, Cause.TENSOR_MISSING, {"stands_as": other_name} if other_name else {})

    def unexpected(self, name: str) -> Loose | None:
        own = Stored(self.actual, name)
        if self._equal_to(own, self.actual, self.matching.actual_of.values()) is not None:
            return None  # a tie, stored under both names
        if _ties(self.expected):
            partner = next((other for other in self._embeddings() if self.actual.shape(other) == own.shape), None)
            if partner is not None:
                return Loose(name, Cause.TIED_WEIGHT_UNTIED, {"tied_with": partner})
        return Loose(name, Cause.TENSOR_UNEXPECTED)

    def _stored_once(self, name: str, twin: str) -> Loose | None:
        """A tied weight that is stored under one name is complete, unless its model does not tie it again."""
        if self.actual.config.get("tie_word_embeddings") is False and _is_embedding(name, twin):
            return Loose(name, Cause.TIED_WEIGHT_DROPPED, {"tied_with": twin, "tie_word_embeddings": False})
        return None

    def _equal_to(self, one: Stored, others: Checkpoint, names: Iterable[str]) -> str | None:
        """Return the name of a tensor with the same bits; constant ones and scalars say nothing and have none."""
        for name in names:
            other = Stored(others, name)
            alike = name != one.name and other.shape == one.shape and other.dtype == one.dtype and one.numel > 1
            if alike and self.comparer.equal(one, other):
                return name
        return None

    def _embeddings(self) -> Iterable[str]:
        return (name for name in self.matching.actual_of.values() if _is_embedding(name))


def _tied_with(checkpoint: Checkpoint, name: str) -> frozenset[str]:
    return frozenset(other for tie in checkpoint.ties if name in tie for other in tie if other != name)


def _ties(checkpoint: Checkpoint) -> bool:
    """Return whether the model of this checkpoint says that it ties its embeddings."""
    return checkpoint.config.get("tie_word_embeddings") is True


def _is_embedding(*names: str) -> bool:
    return any("emb" in name or "wte" in name or name.endswith("shared.weight") for name in names)
