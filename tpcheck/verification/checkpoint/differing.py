"""Compares the bits of many tensors on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from tpcheck.compare.bits import BitComparer
from tpcheck.compare.stored import Stored
from tpcheck.environment import num_cores

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_PIECES = 8  # of a tensor that are one piece of work: cores get even shares, and few tasks are made


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor on both sides, of one shape and dtype."""

    actual: Stored
    expected: Stored


def differing(pairs: Sequence[Pair], progress: Progress | None = None) -> tuple[Pair, ...]:
    """Return the pairs whose bits are not the same.

    Raises:
        CheckpointError: A file does not hold what it should.
    """
    total = sum(pair.expected.nbytes for pair in pairs)
    wrong: dict[int, Pair] = {}
    done = 0
    with BitComparer() as comparer:

        def equal(work: tuple[int, Pair, range]) -> bool:
            number, pair, rows = work
            return number in wrong or comparer.equal_rows(pair.actual, pair.expected, rows)

        for (number, pair, rows), agrees in in_parallel(equal, _works(pairs)):
            if not agrees:
                wrong[number] = pair
            done += len(rows) * (pair.expected.nbytes // pair.expected.num_rows)
            if progress is not None:
                progress(done, total)
    return tuple(wrong[number] for number in sorted(wrong))


def in_parallel(function: Callable[[T], R], values: Iterator[T]) -> Iterator[tuple[T, R]]:
    """Yield each value with what `function` makes of it, as soon as it is made, on as many threads as there are cores.

    Values are drawn as threads come free, so a long iterator costs no memory.
    """
    cores = num_cores()
    with ThreadPoolExecutor(cores) as pool:
        running: dict[Future[R], T] = {pool.submit(function, value): value for value in islice(values, 2 * cores)}
        try:
            while running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield running.pop(future), future.result()
                    for value in islice(values, 1):
                        running[pool.submit(function, value)] = value
        finally:
            for future in running:
                future.cancel()


def _works(pairs: Sequence[Pair]) -> Iterator[tuple[int, Pair, range]]:
    for number, pair in enumerate(pairs):
        pieces = pair.expected.pieces()
        while several := list(islice(pieces, _PIECES)):
            yield number, pair, range(several[0].start, several[-1].stop)
