"""Reads what happened to the shards of a tensor off the runs of slices that it shares with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from math import gcd

from tpcheck.causes.checkpoint.case import Story
from tpcheck.causes.checkpoint.runs import Run, inverse, is_permutation

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


def layout_story(slices: Slices) -> Story | None:
    """Return what the runs tell, or None."""
    if not slices.runs or slices.num_found < _LEAST_MATCHED * min(slices.num_actual, slices.num_expected):
        return None
    return next((story for test in _TESTS if (story := test(slices)) is not None), None)


def _one_shard(slices: Slices) -> Story | None:
    """The tensor is what one rank holds: one chunk, or its chunk of every fused block."""
    if slices.num_actual >= slices.num_expected or not slices.all_found:
        return None
    if len(slices.runs) == 1:
        start = slices.runs[0].source or 0
        rank, num_ranks = _chunk(start, slices.num_actual, slices.num_expected)
        return Story("shard_missing", {"tp_rank": rank, "tp": num_ranks, "from": start})
    num_ranks, rest = divmod(slices.num_expected, slices.num_actual)
    if rest:
        return None
    blocks = [run.length * num_ranks for run in slices.runs]
    starts = accumulate(blocks, initial=0)
    ranks = {divmod((run.source or 0) - start, run.length) for run, start in zip(slices.runs, starts, strict=False)}
    if len(ranks) != 1 or (only := ranks.pop())[1] or not 0 <= only[0] < num_ranks:
        return None
    return Story("shard_missing", {"tp_rank": only[0], "tp": num_ranks, "blocks": blocks})


def _chunk(start: int, length: int, total: int) -> tuple[int | None, int | None]:
    """Return (rank, number of ranks) for a chunk as torch.chunk cuts it, or None where it is not one."""
    if start % length == 0:
        return start // length, -(-total // length)
    if start + length == total:  # the last rank's, which may be smaller than the others
        size = next((size for size in range(length, start + 1) if start % size == 0), None)
        return (start // size, start // size + 1) if size else (None, None)
    return None, None


def _whole_copies(slices: Slices) -> Story | None:
    """Every rank held all of it, and what they held was put together."""
    copies = [(run.source, run.length) for run in slices.runs]
    if slices.num_actual > slices.num_expected and set(copies) == {(0, slices.num_expected)}:
        return Story("not_sharded", {"copies": len(copies)})
    return None


def _fused(slices: Slices) -> Story | None:
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
                return Story("fused_blocks_interleaved", {"blocks": sizes, "parts": num_parts, "runs_over": order})
    return None


def _takes_turns(runs: Sequence[Run], num_blocks: int) -> bool:
    """Return whether the runs go round the blocks, each time taking the next part of the same length."""
    if len(runs) % num_blocks:
        return False
    return all(
        later.length == run.length and later.source == (run.source or 0) + run.length
        for run, later in zip(runs, runs[num_blocks:], strict=False)
    )


def _swapped(slices: Slices) -> Story | None:
    """All shards are there, in another order."""
    runs = slices.runs
    if not is_permutation(runs, slices.num_expected) or len(runs) > _MOST_SHARDS:
        return None
    even = _chunks(slices)
    if even is None and slices.is_vocabulary:
        return None
    if even is None:
        return Story("shard_order_swapped", {"sizes": [run.length for run in runs], "from": [r.source for r in runs]})
    return Story("shard_order_swapped", {"order": even, "tp": len(even)})


def _repeated(slices: Slices) -> Story | None:
    """A shard stands in the places of others, too."""
    if not slices.all_found or slices.num_actual != slices.num_expected:
        return None
    chunks = _chunks(slices)
    if chunks is None or not all(chunks[source] == source for source in chunks):
        return None
    return Story("shard_repeated", {"order": chunks, "tp": len(chunks)})


def _chunks(slices: Slices) -> list[int] | None:
    """Return which even chunk of the reference stands in the place of each, where all runs are made of such chunks."""
    starts = [number for run in slices.runs for number in (run.start, run.source or 0, run.length)]
    size = reduce(gcd, [slices.num_expected, *starts])
    if not size or slices.num_expected // size > _MOST_SHARDS:
        return None
    return [(run.source or 0) // size + part for run in slices.runs for part in range(run.length // size)]


def _padded(slices: Slices) -> Story | None:
    """All of the reference is there, in order, with slices between or behind that are none of it."""
    found = [run for run in slices.runs if run.source is not None]
    in_order = all(run.source == place for run, place in zip(found, _ends(found), strict=False))
    if slices.num_actual <= slices.num_expected or slices.num_found != slices.num_expected or not in_order:
        return None
    padding = [[run.start, run.stop] for run in slices.runs if run.source is None]
    return Story("vocab_offset_wrong" if slices.is_vocabulary else "wrong_shard_boundary", {"padding": padding})


def _ends(runs: Sequence[Run]) -> Iterator[int]:
    return accumulate((run.length for run in runs), initial=0)


def _moved(slices: Slices) -> Story | None:
    """The slices are in order, but some stand twice or not at all, so that others stand in the wrong place."""
    found = [run for run in slices.runs if run.source is not None]
    if len(found) > _MOST_SHARDS or not any(run.shift for run in found):
        return None
    rising = all((earlier.source or 0) < (later.source or 0) for earlier, later in pairwise(found))
    if not rising and not slices.is_vocabulary:
        return None
    first = next(run for run in found if run.shift)
    return Story(
        "vocab_offset_wrong" if slices.is_vocabulary else "wrong_shard_boundary",
        {"first_wrong": first.start, "holds": first.source, "shift": first.shift},
    )


_TESTS: tuple[Callable[[Slices], Story | None], ...] = (
    _one_shard, _whole_copies, _fused, _swapped, _repeated, _padded, _moved,
)  # fmt: skip
