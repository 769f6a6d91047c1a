"""Match the names of two checkpoints: equal names, names that a wrapper or a library changed, tied weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, RenamedWhenSaved
from tpcheck.checkpoints.adapters import AdapterNames, adapter_readings
from tpcheck.checkpoints.mapped import fused_alike
from tpcheck.core.causes import Cause
from tpcheck.numerics.exact.checkpoint_tensor import BitComparer, CheckpointTensor, is_constant

# What torch.compile, FSDP, activation checkpointing and PEFT insert into the names of the tensors that they wrap.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")
# Of DistributedDataParallel and DeepSpeed, PEFT, and models with a head around a model of transformers.
_PREFIXES = ("module.", "base_model.model.", "model.", "transformer.", "_forward_module.")
# LayerNorm in checkpoints that were converted from TensorFlow.
_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}
_MAX_COMMON_PREFIXES = 4  # of those that most names share; each costs one comparison of all names

Rename = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Matching:
    """Names of two checkpoints side by side.

    Attributes:
        actual_of: The actual name for each expected one.
        missing: Expected names without an actual one.
        unexpected: Actual names without an expected one.
        renamed: Which parts of names were ignored, in words; empty where names are equal.
        left_out: What one side holds beside what is compared, and why it is not.
    """

    actual_of: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    renamed: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def match_names(actual: Sequence[str], expected: Sequence[str]) -> Matching:
    """Return the matching with the most pairs and, among those, the fewest changes of names."""
    expected_set = frozenset(expected)
    best = max(
        _renamings(actual, expected),
        key=lambda renaming: (renaming.count_pairs(actual, expected_set), -len(renaming.words)),
    )
    count = Counter(best.actual(name) for name in actual)
    actual_by_new_name = {best.actual(name): name for name in actual if count[best.actual(name)] == 1}
    actual_of = {
        name: actual_by_new_name[best.expected(name)] for name in expected if best.expected(name) in actual_by_new_name
    }
    matched = frozenset(actual_of.values())
    return Matching(
        actual_of=actual_of,
        missing=tuple(name for name in expected if name not in actual_of),
        unexpected=tuple(name for name in actual if name not in matched),
        renamed=best.words,
    )


@dataclass(frozen=True, slots=True)
class _Renaming:
    """Changes of names that may make both sides equal, with the same in words."""

    actual: Rename
    expected: Rename
    words: tuple[str, ...] = ()

    def count_pairs(self, actual: Iterable[str], expected: Iterable[str]) -> int:
        return len({self.actual(name) for name in actual} & {self.expected(name) for name in expected})


def _renamings(actual: Sequence[str], expected: Sequence[str]) -> Iterator[_Renaming]:
    unwrap_actual, unwrap_expected = _unwrapping(actual), _unwrapping(expected)
    words = (*_unwrapped("actual", actual, unwrap_actual), *_unwrapped("the reference", expected, unwrap_expected))
    yield _Renaming(_chain(), _chain())
    yield _Renaming(unwrap_actual, unwrap_expected, words)
    actual_names, expected_names = list(map(unwrap_actual, actual)), list(map(unwrap_expected, expected))
    for prefix in _prefixes(actual_names, frozenset(expected_names)):
        ignored = f"names of actual carry the prefix {prefix!r}"
        yield _Renaming(_chain(unwrap_actual, _without_prefix(prefix)), unwrap_expected, (*words, ignored))
    for prefix in _prefixes(expected_names, frozenset(actual_names)):
        ignored = f"names of the reference carry the prefix {prefix!r}"
        yield _Renaming(unwrap_actual, _chain(unwrap_expected, _without_prefix(prefix)), (*words, ignored))


def _prefixes(names: Sequence[str], other_names: frozenset[str]) -> Iterator[str]:
    """Yield prefixes whose removal makes names equal to other ones: the usual ones, and those that most names share."""
    yield from (prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names))
    count = Counter(name.removesuffix(tail) for name in names for tail in _tails(name) if tail in other_names)
    common = [prefix for prefix, number in count.most_common(_MAX_COMMON_PREFIXES) if 2 * number > len(names)]
    yield from (prefix for prefix in common if prefix not in _PREFIXES)


def _tails(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(1, len(parts)))


def _unwrapping(names: Sequence[str]) -> Rename:
    changes = [_without_part(part) for part in _WRAPPERS if any(part in name for name in names)]
    if any(name.endswith(tuple(_SUFFIXES)) for name in names):
        changes.append(_with_torch_suffix)
    of_adapter = AdapterNames.of(names).of_adapter
    if len(of_adapter) == 1 and not of_adapter.keys() & {""}:
        new_names = {old: new for new, old in next(iter(of_adapter.values())).items()}
        changes.insert(0, lambda name: new_names.get(name, name))
    return _chain(*changes)


def _unwrapped(side: str, names: Sequence[str], rename: Rename) -> Iterator[str]:
    changed = [name for name in names if rename(name) != name]
    if changed:
        example = f"{changed[0]!r} as {rename(changed[0])!r}"
        yield f"{len(changed)} names of {side} are read without what a wrapper inserted, such as {example}"


def _chain(*changes: Rename) -> Rename:
    return lambda name: reduce(lambda changed, change: change(changed), changes, name)


def _without_part(part: str) -> Rename:
    return lambda name: name.replace(part, "")


def _without_prefix(prefix: str) -> Rename:
    return lambda name: name.removeprefix(prefix)


def _with_torch_suffix(name: str) -> str:
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix) + _SUFFIXES[suffix] if suffix else name


def read_with_best_names(actual: Checkpoint, expected: Checkpoint) -> tuple[Checkpoint, Checkpoint, Matching]:
    """Return both checkpoints and how their names match; a live model as its library saves it where more names match.

    transformers saves some models under other names, and fused weights as several tensors.
    """
    matching = match_names(actual.names(), expected.names())
    if not matching.missing and not matching.unexpected:
        return actual, expected, matching
    readings = [(actual, expected, matching), *_as_saved(actual, expected), *_with_adapters(actual, expected)]
    readings += _fused(actual, expected)
    return min(readings, key=lambda reading: len(reading[2].missing) + len(reading[2].unexpected))


def _as_saved(actual: Checkpoint, expected: Checkpoint) -> Iterator[tuple[Checkpoint, Checkpoint, Matching]]:
    for side, checkpoint in (("actual", actual), ("the reference", expected)):
        saved = checkpoint.as_saved() if isinstance(checkpoint, RenamedWhenSaved) else None
        if saved is not None:
            pair = (saved, expected) if side == "actual" else (actual, saved)
            matching = match_names(pair[0].names(), pair[1].names())
            renamed = (*matching.renamed, f"{side} is read as its library saves it")
            yield *pair, replace(matching, renamed=renamed)


def _fused(actual: Checkpoint, expected: Checkpoint) -> Iterator[tuple[Checkpoint, Checkpoint, Matching]]:
    sides = fused_alike(actual, expected)
    if sides is not None:
        matching = match_names(sides[0].names(), sides[1].names())
        words = (*matching.renamed, "Q, K and V, gate and up are compared together, as one side keeps them")
        yield *sides, replace(matching, renamed=words)


def _with_adapters(actual: Checkpoint, expected: Checkpoint) -> Iterator[tuple[Checkpoint, Checkpoint, Matching]]:
    for reading in adapter_readings(actual, expected):
        matching = match_names(reading.actual.names(), reading.expected.names())
        renamed = (*matching.renamed, reading.words)
        yield (
            reading.actual,
            reading.expected,
            replace(matching, renamed=renamed, left_out=reading.left_out),
        )


@dataclass(frozen=True, slots=True)
class UnmatchedName:
    """A name that only one checkpoint has.

    Attributes:
        name: The name.
        cause: What it means.
        evidence: Which tensor it belongs to, where one is found.
    """

    name: str
    cause: Cause
    evidence: Mapping[str, Any] = field(default_factory=dict)


def unmatched_names(
    actual: Checkpoint, expected: Checkpoint, matching: Matching, cast: torch.dtype | None = None
) -> tuple[UnmatchedName, ...]:
    """Return the names that only one checkpoint has, without ties that one stores once and the other twice.

    Args:
        cast: The dtype that floating point values of `expected` are rounded to before they are compared.
    """
    with BitComparer() as comparer:
        names = _Names(actual, expected, matching, cast, comparer)
        renamed: set[str] = set()
        missing = []
        for name in matching.missing:
            unmatched = names.missing(name, renamed)
            if unmatched is not None:
                missing.append(unmatched)
                renamed |= {unmatched.evidence.get("stands_as", name)}
        unexpected = [
            unmatched for name in matching.unexpected if name not in renamed and (unmatched := names.unexpected(name))
        ]
    return (*missing, *unexpected)


@dataclass(frozen=True, slots=True)
class _Names:
    """Two checkpoints whose names have been matched."""

    actual: Checkpoint
    expected: Checkpoint
    matching: Matching
    cast: torch.dtype | None
    comparer: BitComparer

    def missing(self, name: str, taken: Set[str]) -> UnmatchedName | None:
        """Explain an expected name that the actual checkpoint lacks; None where a tied name stands for it.

        Args:
            taken: Names of the actual checkpoint that stand for other expected ones.
        """
        tied = frozenset(other for tie in self.expected.ties if name in tie for other in tie if other != name)
        stored = next((other for other in tied if other in self.matching.actual_of), None)
        if tied:
            dropped = UnmatchedName(name, Cause.TIED_WEIGHT_DROPPED, {"tied_with": sorted(tied)})
            return dropped if stored is None else self._stored_once(name, stored)
        twin = self._equal_tensor(CheckpointTensor(self.expected, name), self.expected, self.matching.actual_of)
        if twin is not None and _ties_embeddings(self.actual):
            return self._stored_once(name, twin)
        if twin is not None:
            return UnmatchedName(name, Cause.TIED_WEIGHT_DROPPED, {"equals": twin})
        tensor = CheckpointTensor(self.expected, name, self.cast)
        candidates = [other for other in self.matching.unexpected if other not in taken]
        candidates.sort(key=lambda other: _numbers(other) != _numbers(name))  # the same layer and expert first
        other_name = self._equal_tensor(tensor, self.actual, candidates)
        return UnmatchedName(name, Cause.TENSOR_MISSING, {"stands_as": other_name} if other_name else {})

    def unexpected(self, name: str) -> UnmatchedName | None:
        """Explain an actual name that the reference lacks; None where it is a tie that is stored under both names."""
        matched = self.matching.actual_of.values()
        if any(name in tie and not tie.isdisjoint(matched) for tie in self.actual.ties):
            return None
        tensor = CheckpointTensor(self.actual, name)
        if self._equal_tensor(tensor, self.actual, matched) is not None:
            return None
        if _ties_embeddings(self.expected):
            embeddings = (other for other in matched if _is_embedding(other))
            partner = next((other for other in embeddings if self.actual.shape(other) == tensor.shape), None)
            if partner is not None:
                return UnmatchedName(name, Cause.TIED_WEIGHT_UNTIED, {"tied_with": partner})
        return UnmatchedName(name, Cause.TENSOR_UNEXPECTED)

    def _stored_once(self, name: str, twin: str) -> UnmatchedName | None:
        """Return None: a tied weight stored under one name is enough, unless loading the model does not tie it."""
        if self.actual.config.get("tie_word_embeddings") is False and _is_embedding(name, twin):
            evidence = {"tied_with": twin, "tie_word_embeddings": False}
            return UnmatchedName(name, Cause.TIED_WEIGHT_DROPPED, evidence)
        return None

    def _equal_tensor(self, tensor: CheckpointTensor, checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
        """Return the name of a tensor with the same bits; None for a constant tensor, which equals many others."""
        for name in names:
            other = CheckpointTensor(checkpoint, name)
            same_kind = name != tensor.name and other.shape == tensor.shape and other.dtype == tensor.dtype
            if same_kind and self.comparer.equal(tensor, other):
                return None if is_constant(tensor) else name
        return None


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _ties_embeddings(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("tie_word_embeddings") is True


def _is_embedding(*names: str) -> bool:
    return any("emb" in name or "wte" in name or name.endswith("shared.weight") for name in names)
