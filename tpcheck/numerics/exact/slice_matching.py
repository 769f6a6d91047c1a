"""What happened to the shards of a tensor: find the slices of the expected tensor again in the actual one.

Each slice along a dim has a digest. Consecutive slices that are consecutive in the expected tensor, too, make a run;
the runs show whether shards are missing, repeated, swapped, interleaved or shifted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from math import gcd, prod
from typing import Any

import torch

from tpcheck.core.causes import Cause, Explanation, first_explanation
from tpcheck.core.digests import odd_keys
from tpcheck.numerics.exact.checkpoint_tensor import CheckpointTensor, bit_view

_MAX_RUNS = 4096  # no layout of shards, heads or groups has more
_MAX_SHARDS = 64  # ranks of the largest TP group; a permutation of more pieces is not one of shards
# Of three heads over two ranks one has two; where a rank would have more, the other would have none. A vocabulary that
# lost its last token is no rank's.
_MAX_SHARE_OF_A_RANK = 2 / 3
_MIN_SHARE_FOUND = 0.5  # share of the slices that must be found again before they show anything

_BLOCK = 1 << 18  # elements multiplied at once: their 8-byte words and keys stay in the cache


def slice_digests(tensor: CheckpointTensor, dim: int) -> torch.Tensor:
    """Return a 64-bit digest of the bits at each index of `dim`; shape (size of dim,).

    A digest depends on the order of the elements of the other dims alone, so the digests of a matrix's rows are those
    of the columns of its transpose. It is a multilinear sum with pseudo-random odd keys (splitmix64): two slices have
    the same one by chance with probability 2^-63 (Lemire, Kaser: Strongly universal string hashing is fast, arXiv
    1202.4961).
    """
    shape = tensor.shape or (1,)
    sums = torch.zeros(shape[dim], dtype=torch.int64)
    numel_per_slice = prod(shape[1:]) // (shape[dim] if dim else 1)  # of one row
    rows_at_once = max(1, _BLOCK // max(1, prod(shape[1:])))
    for rows in tensor.pieces():
        piece = bit_view(tensor.read(rows)).reshape(len(rows), *shape[1:], -1)
        for start in range(0, len(rows), rows_at_once):
            words = piece[start : start + rows_at_once].to(torch.int64)
            if dim == 0:
                flat = words.reshape(len(words), -1)
                sums[rows.start + start : rows.start + start + len(words)] = (flat * odd_keys(0, flat.shape[1])).sum(1)
            else:
                flat = words.movedim(dim, 0).reshape(shape[dim], -1)
                first = (rows.start + start) * numel_per_slice * words.shape[-1]
                sums += (flat * odd_keys(first, flat.shape[1])).sum(1)
    return sums


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive slices of the actual tensor that are consecutive in the expected one, too.

    Attributes:
        start: Index of the first slice.
        length: Number of slices.
        source: Index in the expected tensor of the slice that equals the first; None where none does.
    """

    start: int
    length: int
    source: int | None

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def shift(self) -> int:
        """Return how far the slices have moved."""
        assert self.source is not None
        return self.start - self.source


def find_runs(actual: Sequence[int], expected: Sequence[int]) -> tuple[Run, ...]:
    """Return the longest runs that make up `actual`, from the digests of the slices; nothing where there are too many.

    A slice may equal several of the expected tensor. Then the run continues if it can; else the slice is taken as its
    own index, else as the next one behind the last run, else as the first.
    """
    indices: dict[int, list[int]] = {}
    for index, digest in enumerate(expected):
        indices.setdefault(digest, []).append(index)
    runs: list[Run] = []
    for index, digest in enumerate(actual):
        last = runs[-1] if runs else Run(0, 0, 0)
        following = None if last.source is None else last.source + last.length
        if following is not None and following < len(expected) and expected[following] == digest:
            source: int | None = following
        else:
            source = _choose(indices.get(digest, ()), index, following)
        if runs and source == following:
            runs[-1] = Run(last.start, last.length + 1, last.source)
        else:
            runs.append(Run(index, 1, source))
        if len(runs) > _MAX_RUNS:
            return ()
    return tuple(runs)


def _choose(candidates: Sequence[int], index: int, following: int | None) -> int | None:
    if not candidates:
        return None
    if index in candidates:
        return index
    return next((other for other in candidates if following is not None and other >= following), candidates[0])


def _is_permutation(runs: Sequence[Run], num_slices: int) -> bool:
    """Return whether the runs hold every slice of the expected tensor once."""
    spans = sorted((run.source, run.length) for run in runs if run.source is not None)
    if len(spans) != len(runs) or not spans or spans[0][0] != 0:
        return False
    without_gap = all(start + length == next_start for (start, length), (next_start, _) in pairwise(spans))
    return without_gap and sum(spans[-1]) == num_slices


def _inverse(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Return the runs of the inverse permutation."""
    inverse = [Run(run.source, run.length, run.start) for run in runs if run.source is not None]
    return tuple(sorted(inverse, key=lambda run: run.start))


@dataclass(frozen=True, slots=True)
class Slices:
    """The slices of a tensor along one dim.

    Attributes:
        runs: Where the actual slices come from.
        num_actual, num_expected: How many there are.
        is_vocabulary: Whether the indices of the dim are tokens.
        is_fused: Whether the name says that the tensor holds several matrices (Q, K and V; gate and up).
        may_exchange: What it is called if its last two matrices are exchanged; None where its name shows no such.
        num_keys: How many slices of a fused Q, K and V are keys, where that is known.
        min_length: How many slices in a row show that they come from elsewhere: one element of a vector may equal
            another by chance.
    """

    runs: tuple[Run, ...]
    num_actual: int
    num_expected: int
    is_vocabulary: bool = False
    is_fused: bool = False
    may_exchange: Cause | None = None
    num_keys: int | None = None
    min_length: int = 1

    @property
    def all_found(self) -> bool:
        return all(run.source is not None for run in self.runs)

    @property
    def num_found(self) -> int:
        return sum(run.length for run in self.runs if run.source is not None)


def explain_slices(slices: Slices) -> Explanation | None:
    """Return the first cause whose test the runs pass, or None."""
    if not slices.runs or slices.num_found < _MIN_SHARE_FOUND * min(slices.num_actual, slices.num_expected):
        return None
    return first_explanation(slices, TESTS)


def one_shard(slices: Slices) -> Explanation | None:
    """The tensor is what one rank holds: one chunk, or its chunk of every fused block."""
    if slices.num_actual >= slices.num_expected or not slices.all_found:
        return None
    if len(slices.runs) == 1:
        start = slices.runs[0].source or 0
        if slices.num_actual > _MAX_SHARE_OF_A_RANK * slices.num_expected:
            return None
        rank, num_ranks = _rank_of_chunk(start, slices.num_actual, slices.num_expected)
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


def _rank_of_chunk(start: int, length: int, total: int) -> tuple[int | None, int | None]:
    """Return (rank, number of ranks) of a chunk as torch.chunk cuts it, or (None, None) where it is not one."""
    if start % length == 0:
        return start // length, -(-total // length)
    if start + length == total:  # the last rank's, which may be smaller than the others
        size = next((size for size in range(length, start + 1) if start % size == 0), None)
        return (start // size, start // size + 1) if size else (None, None)
    return None, None


def full_copies(slices: Slices) -> Explanation | None:
    """Every rank held the full tensor, and the copies were concatenated."""
    copies = [(run.source, run.length) for run in slices.runs]
    if slices.num_actual > slices.num_expected and set(copies) == {(0, slices.num_expected)}:
        return Explanation(Cause.NOT_SHARDED, evidence={"copies": len(copies)})
    return None


def exchanged_blocks(slices: Slices) -> Explanation | None:
    """Gate and up, or K and V, of a fused tensor are in each other's place: as a whole, or in some ranks' parts."""
    moved = [run for run in slices.runs if run.source is not None and run.shift]
    distances = {abs(run.shift) for run in moved}
    if slices.may_exchange is None or len(distances) != 1 or not _is_permutation(slices.runs, slices.num_expected):
        return None
    distance, total = distances.pop(), slices.num_expected
    if slices.may_exchange is Cause.GATE_UP_EXCHANGED:
        are_exchanged = 2 * distance == total
    else:
        are_exchanged = _are_keys_and_values(moved, distance, total, slices.num_keys)
    if not are_exchanged:
        return None
    first = [run for run in moved if run.shift < 0]
    evidence: dict[str, Any] = {"distance": distance, "rows": [[run.start, run.stop] for run in first]}
    if len(first) == 1 and distance % first[0].length == 0 and first[0].length < distance:  # one of the ranks' parts
        start = first[0].start % distance
        evidence |= {"tp_rank": start // first[0].length, "tp": distance // first[0].length}
    return Explanation(slices.may_exchange, evidence=evidence)


def _are_keys_and_values(moved: Sequence[Run], distance: int, total: int, num_keys: int | None) -> bool:
    """Return whether these are slices of K and V: the last two blocks of all rows, or of each group of heads."""
    if min(run.start for run in moved) >= total - 2 * distance and 3 * distance <= total:
        return num_keys in (None, distance)
    ends = [run.stop + distance for run in moved if run.shift < 0]
    group = reduce(gcd, ends, total)
    return all(run.length == distance for run in moved) and group >= 3 * distance


def fused_blocks(slices: Slices) -> Explanation | None:
    """Fused blocks were cut or concatenated as if they were one."""
    if not _is_permutation(slices.runs, slices.num_expected) or slices.num_actual != slices.num_expected:
        return None
    for runs, order in ((slices.runs, "ranks"), (_inverse(slices.runs), "blocks")):
        for num_blocks in range(2, len(runs) // 2 + 1):
            if _alternates(runs, num_blocks):
                num_parts = len(runs) // num_blocks
                if num_blocks == num_parts == 2 and not slices.is_fused:
                    return None  # of four chunks the middle ones are exchanged: two ranks of four are swapped
                sizes = [runs[block].length * num_parts for block in range(num_blocks)]
                return Explanation(
                    Cause.FUSED_BLOCKS_INTERLEAVED, evidence={"blocks": sizes, "parts": num_parts, "runs_over": order}
                )
    return None


def _alternates(runs: Sequence[Run], num_blocks: int) -> bool:
    """Return whether the runs cycle through the blocks, each time with the next part of the same length."""
    if len(runs) % num_blocks:
        return False
    return all(
        later.length == run.length and later.source == (run.source or 0) + run.length
        for run, later in zip(runs, runs[num_blocks:], strict=False)
    )


def swapped_shards(slices: Slices) -> Explanation | None:
    """All shards are there, in another order.

    Slices that stand one by one in another order, such as reversed ones, show no shards, unless there are but two.
    """
    runs = slices.runs
    if not _is_permutation(runs, slices.num_expected) or len(runs) > _MAX_SHARDS:
        return None
    if len(runs) > 2 and all(run.length == 1 for run in runs):
        return None
    order = _order_of_chunks(slices)
    if order is not None and (len(order) < slices.num_expected or len(order) == len(runs)):
        return Explanation(Cause.SHARD_ORDER_SWAPPED, evidence={"order": order, "tp": len(order)})
    if slices.is_vocabulary:
        return None
    uneven = {"sizes": [run.length for run in runs], "from": [run.source for run in runs]}
    return Explanation(Cause.SHARD_ORDER_SWAPPED, evidence=uneven)


def repeated_shards(slices: Slices) -> Explanation | None:
    """One shard stands at the positions of others, too; or several ranks hold each, as of few key-value heads."""
    if not slices.all_found or slices.num_actual < slices.num_expected:
        return None
    order = _order_of_chunks(slices)
    if order is None or slices.num_actual < slices.min_length * len(order):
        return None
    if slices.num_actual > slices.num_expected:
        copies, rest = divmod(slices.num_actual, slices.num_expected)
        if rest or order != [place // copies for place in range(len(order))]:
            return None
        return Explanation(Cause.SHARD_REPEATED, evidence={"order": order, "tp": len(order), "copies": copies})
    if not all(order[source] == source for source in order):
        return None
    return Explanation(Cause.SHARD_REPEATED, evidence={"order": order, "tp": len(order)})


def _order_of_chunks(slices: Slices) -> list[int] | None:
    """Return which chunk of the expected tensor stands at each position, or None where the runs are not even chunks."""
    edges = [number for run in slices.runs for number in (run.start, run.source or 0, run.length)]
    size = reduce(gcd, [slices.num_expected, *edges])
    if not size or slices.num_expected // size > _MAX_SHARDS:
        return None
    return [(run.source or 0) // size + part for run in slices.runs for part in range(run.length // size)]


def padding_kept(slices: Slices) -> Explanation | None:
    """The full expected tensor is there, in order, with other slices in between or behind."""
    found = [run for run in slices.runs if run.source is not None]
    in_order = all(
        run.source == start
        for run, start in zip(found, accumulate((run.length for run in found), initial=0), strict=False)
    )
    if slices.num_actual <= slices.num_expected or slices.num_found != slices.num_expected or not in_order:
        return None
    padding = [[run.start, run.stop] for run in slices.runs if run.source is None]
    return Explanation(_cause_of_shift(slices), evidence={"padding": padding})


def shifted_slices(slices: Slices) -> Explanation | None:
    """The slices are in order, but some are there twice or not at all, so that others have moved."""
    found = [run for run in slices.runs if run.source is not None]
    if len(found) > _MAX_SHARDS or not any(run.shift and run.length >= slices.min_length for run in found):
        return None
    in_order = all((earlier.source or 0) < (later.source or 0) for earlier, later in pairwise(found))
    if not in_order and not slices.is_vocabulary:
        return None
    first = next(run for run in found if run.shift)
    evidence = {"first_wrong": first.start, "holds": first.source, "shift": first.shift}
    return Explanation(_cause_of_shift(slices), evidence=evidence)


def _cause_of_shift(slices: Slices) -> Cause:
    return Cause.VOCAB_OFFSET_WRONG if slices.is_vocabulary else Cause.WRONG_SHARD_BOUNDARY


TESTS: tuple[Callable[[Slices], Explanation | None], ...] = (
    one_shard,
    full_copies,
    exchanged_blocks,
    fused_blocks,
    swapped_shards,
    repeated_shards,
    padding_kept,
    shifted_slices,
)
