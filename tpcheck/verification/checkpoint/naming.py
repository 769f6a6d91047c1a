"""Which name of one checkpoint stands for which of the other: an equal one, or one that a usual change makes equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

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
