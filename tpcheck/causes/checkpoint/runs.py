"""Where the slices of a tensor come from: runs of consecutive slices that the reference holds, too."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

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
