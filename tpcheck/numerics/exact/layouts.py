"""Reads what happened to the shards of a tensor off the runs of slices that it shares with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from math import gcd

from tpcheck.backends.checkpoint_format import Checkpoint
from tpcheck.core.causes import Cause, Explanation, first_explanation
from tpcheck.families.special_cases import VOCABULARY_PARAMETER
from tpcheck.numerics.exact.elements import ElementDifference
from tpcheck.numerics.exact.stored import BitComparer, Stored


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a tensor can be compared with beside its own counterpart.

    Attributes:
        reference: The whole reference.
        earlier: Checkpoints of earlier steps, by what the caller calls them, with the names of this reference.
        comparer: Compares bits.
    """

    reference: Checkpoint
    earlier: Mapping[str, Checkpoint]
    comparer: BitComparer

    def equal(self, actual: Stored, expected: Stored) -> bool:
        """Return whether two tensors have one shape, one dtype and the same bits."""
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return False
        return self.comparer.equal(actual, expected)


@dataclass(frozen=True, slots=True)
class Case:
    """A tensor whose values, shape or dtype are not those of its counterpart in the reference.

    Attributes:
        actual, expected: Both sides, of one dtype: where the stored ones differ, the expected one is rounded.
        difference: Which elements differ, where the shapes are equal.
        surroundings: What else there is.
    """

    actual: Stored
    expected: Stored
    difference: ElementDifference | None
    surroundings: Surroundings

    @property
    def same_shape(self) -> bool:
        return self.actual.shape == self.expected.shape

    def is_vocabulary(self, dim: int) -> bool:
        """Return whether the indices of `dim` are tokens, by the model's configuration or by the usual names."""
        size = self.surroundings.reference.config.get("vocab_size")
        if isinstance(size, int):
            return bool(self.expected.shape[dim] == size)
        return dim == 0 and VOCABULARY_PARAMETER.matches(self.expected.name)


MOST_RUNS = 4096  # more than that is no layout of shards, heads or groups


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive slices of the actual tensor.

    Attributes:
        start: The first one.
        length: How many.
        source: The first of the slices of the reference that they equal; None where they equal none.
    """

    start: int
    length: int
    source: int | None

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def shift(self) -> int:
        """How far they have moved."""
        assert self.source is not None
        return self.start - self.source


def runs_of(actual: list[int], expected: list[int]) -> tuple[Run, ...]:
    """Return the runs that make up `actual`, as long as they can be; nothing where there are too many.

    Where a slice stands at several places of the reference, a run goes on if it can, else its own place is taken,
    else the one behind the last run, else the first.
    """
    places: dict[int, list[int]] = {}
    for place, one in enumerate(expected):
        places.setdefault(one, []).append(place)
    found: list[Run] = []
    for index, one in enumerate(actual):
        last = found[-1] if found else Run(0, 0, 0)
        follows = None if last.source is None else last.source + last.length
        if follows is not None and follows < len(expected) and expected[follows] == one:
            source: int | None = follows
        else:
            source = _choice(places.get(one, ()), index, follows)
        if found and source == follows and (source is None) == (last.source is None):
            found[-1] = Run(last.start, last.length + 1, last.source)
        else:
            found.append(Run(index, 1, source))
        if len(found) > MOST_RUNS:
            return ()
    return tuple(found)


def _choice(places: list[int] | tuple[()], index: int, follows: int | None) -> int | None:
    if not places:
        return None
    if index in places:
        return index
    return next((place for place in places if follows is not None and place >= follows), places[0])


def is_permutation(runs: tuple[Run, ...], size: int) -> bool:
    """Return whether the runs hold every slice of a reference of `size` slices, once."""
    spans = sorted((run.source, run.length) for run in runs if run.source is not None)
    if len(spans) != len(runs) or not spans or spans[0][0] != 0:
        return False
    ends_meet = all(start + length == following for (start, length), (following, _) in pairwise(spans))
    return ends_meet and sum(spans[-1]) == size


def inverse(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Return the runs of the permutation that undoes this one."""
    moved = [Run(run.source, run.length, run.start) for run in runs if run.source is not None]
    return tuple(sorted(moved, key=lambda run: run.start))


_MOST_SHARDS = 64  # a TP group is no larger; a permutation of more pieces is not one of shards
_LEAST_MATCHED = 0.5  # share of the slices that must be found again before they tell anything


@dataclass(frozen=True, slots=True)
class Slices:
    """One dim of a tensor, cut into slices.

    Attributes:
        runs: Where the actual slices come from.
        num_actual, num_expected: How many there are.
        is_vocabulary: The slices are tokens.
        is_fused: The name says that several matrices lie in this one (Q, K and V; gate and up).
    """

    runs: tuple[Run, ...]
    num_actual: int
    num_expected: int
    is_vocabulary: bool
    is_fused: bool

    @property
    def all_found(self) -> bool:
        return all(run.source is not None for run in self.runs)

    @property
    def num_found(self) -> int:
        return sum(run.length for run in self.runs if run.source is not None)


def layout_story(slices: Slices) -> Explanation | None:
    """Return what the runs tell, or None."""
    if not slices.runs or slices.num_found < _LEAST_MATCHED * min(slices.num_actual, slices.num_expected):
        return None
    return first_explanation(slices, _TESTS)


def _one_shard(slices: Slices) -> Explanation | None:
    """The tensor is what one rank holds: one chunk, or its chunk of every fused block."""
    if slices.num_actual >= slices.num_expected or not slices.all_found:
        return None
    if len(slices.runs) == 1:
        start = slices.runs[0].source or 0
        rank, num_ranks = _chunk(start, slices.num_actual, slices.num_expected)
        return Explanation(Cause.SHARD_MISSING, evidence={"tp_rank": rank, "tp": num_ranks, "from": start})
    num_ranks, rest = divmod(slices.num_expected, slices.num_actual)
    if rest:
        return None
    blocks = [run.length * num_ranks for run in slices.runs]
    starts = accumulate(blocks, initial=0)
    ranks = {divmod((run.source or 0) - start, run.length) for run, start in zip(slices.runs, starts, strict=False)}
    if len(ranks) != 1 or (only := ranks.pop())[1] or not 0 <= only[0] < num_ranks:
        return None
    return Explanation(Cause.SHARD_MISSING, evidence={"tp_rank": only[0], "tp": num_ranks, "blocks": blocks})


def _chunk(start: int, length: int, total: int) -> tuple[int | None, int | None]:
    """Return (rank, number of ranks) for a chunk as torch.chunk cuts it, or None where it is not one."""
    if start % length == 0:
        return start // length, -(-total // length)
    if start + length == total:  # the last rank's, which may be smaller than the others
        size = next((size for size in range(length, start + 1) if start % size == 0), None)
        return (start // size, start // size + 1) if size else (None, None)
    return None, None


def _whole_copies(slices: Slices) -> Explanation | None:
    """Every rank held all of it, and what they held was put together."""
    copies = [(run.source, run.length) for run in slices.runs]
    if slices.num_actual > slices.num_expected and set(copies) == {(0, slices.num_expected)}:
        return Explanation(Cause.NOT_SHARDED, evidence={"copies": len(copies)})
    return None


def _fused(slices: Slices) -> Explanation | None:
    """Blocks that lie in one matrix were cut or put together as if they were one."""
    if not is_permutation(slices.runs, slices.num_expected) or slices.num_actual != slices.num_expected:
        return None
    for runs, order in ((slices.runs, "ranks"), (inverse(slices.runs), "blocks")):
        for num_blocks in range(2, len(runs) // 2 + 1):
            if _takes_turns(runs, num_blocks):
                num_parts = len(runs) // num_blocks
                if num_blocks == num_parts == 2 and not slices.is_fused:
                    return None  # four chunks, the middle ones exchanged: two ranks of four that changed places
                sizes = [runs[block].length * num_parts for block in range(num_blocks)]
                return Explanation(
                    Cause.FUSED_BLOCKS_INTERLEAVED, evidence={"blocks": sizes, "parts": num_parts, "runs_over": order}
                )
    return None


def _takes_turns(runs: Sequence[Run], num_blocks: int) -> bool:
    """Return whether the runs go round the blocks, each time taking the next part of the same length."""
    if len(runs) % num_blocks:
        return False
    return all(
        later.length == run.length and later.source == (run.source or 0) + run.length
        for run, later in zip(runs, runs[num_blocks:], strict=False)
    )


def _swapped(slices: Slices) -> Explanation | None:
    """All shards are there, in another order."""
    runs = slices.runs
    if not is_permutation(runs, slices.num_expected) or len(runs) > _MOST_SHARDS:
        return None
    even = _chunks(slices)
    if even is None and slices.is_vocabulary:
        return None
    if even is None:
        return Explanation(
            Cause.SHARD_ORDER_SWAPPED,
            evidence={"sizes": [run.length for run in runs], "from": [r.source for r in runs]},
        )
    return Explanation(Cause.SHARD_ORDER_SWAPPED, evidence={"order": even, "tp": len(even)})


def _repeated(slices: Slices) -> Explanation | None:
    """A shard stands in the places of others, too."""
    if not slices.all_found or slices.num_actual != slices.num_expected:
        return None
    chunks = _chunks(slices)
    if chunks is None or not all(chunks[source] == source for source in chunks):
        return None
    return Explanation(Cause.SHARD_REPEATED, evidence={"order": chunks, "tp": len(chunks)})


def _chunks(slices: Slices) -> list[int] | None:
    """Return which even chunk of the reference stands in the place of each, where all runs are made of such chunks."""
    starts = [number for run in slices.runs for number in (run.start, run.source or 0, run.length)]
    size = reduce(gcd, [slices.num_expected, *starts])
    if not size or slices.num_expected // size > _MOST_SHARDS:
        return None
    return [(run.source or 0) // size + part for run in slices.runs for part in range(run.length // size)]


def _padded(slices: Slices) -> Explanation | None:
    """All of the reference is there, in order, with slices between or behind that are none of it."""
    found = [run for run in slices.runs if run.source is not None]
    in_order = all(run.source == place for run, place in zip(found, _ends(found), strict=False))
    if slices.num_actual <= slices.num_expected or slices.num_found != slices.num_expected or not in_order:
        return None
    padding = [[run.start, run.stop] for run in slices.runs if run.source is None]
    return Explanation(
        Cause.VOCAB_OFFSET_WRONG if slices.is_vocabulary else Cause.WRONG_SHARD_BOUNDARY, evidence={"padding": padding}
    )


def _ends(runs: Sequence[Run]) -> Iterator[int]:
    return accumulate((run.length for run in runs), initial=0)


def _moved(slices: Slices) -> Explanation | None:
    """The slices are in order, but some stand twice or not at all, so that others stand in the wrong place."""
    found = [run for run in slices.runs if run.source is not None]
    if len(found) > _MOST_SHARDS or not any(run.shift for run in found):
        return None
    rising = all((earlier.source or 0) < (later.source or 0) for earlier, later in pairwise(found))
    if not rising and not slices.is_vocabulary:
        return None
    first = next(run for run in found if run.shift)
    return Explanation(
        Cause.VOCAB_OFFSET_WRONG if slices.is_vocabulary else Cause.WRONG_SHARD_BOUNDARY,
        evidence={"first_wrong": first.start, "holds": first.source, "shift": first.shift},
    )


_TESTS: tuple[Callable[[Slices], Explanation | None], ...] = (
    _one_shard, _whole_copies, _fused, _swapped, _repeated, _padded, _moved,
)  # fmt: skip
