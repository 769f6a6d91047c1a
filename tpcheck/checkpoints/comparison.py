"""Compares two checkpoints: names, shapes, dtypes, ties, then bits; and tells what happened to what differs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, ReadOptions
from tpcheck.backends.registry import checkpoint_formats
from tpcheck.checkpoints.names import Loose, best_reading, loose_names
from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.environment import num_cores
from tpcheck.core.errors import CheckpointError, UsageError
from tpcheck.core.findings import Coverage, Finding
from tpcheck.numerics.checks import CHECKPOINT_CHECK
from tpcheck.numerics.exact.elements import ElementDifference, element_difference
from tpcheck.numerics.exact.explain import explain_tensor
from tpcheck.numerics.exact.layouts import Case, Surroundings
from tpcheck.numerics.exact.stored import BitComparer, Stored


def opened(name: str, source: Any, options: ReadOptions) -> Checkpoint:
    """Return the checkpoint at a path, or in a live object, opened by the format that recognises it.

    Args:
        name: What the caller calls it, for messages: `actual` or `reference`.

    Raises:
        UsageError: There is nothing at that path, or no format knows what is there.
        CheckpointError: The files are damaged, hostile or incomplete.
    """
    found = _path(name, source) if isinstance(source, (str, os.PathLike)) else source
    formats = checkpoint_formats()
    for one in formats:
        if one.recognises(found):
            return one.open(found, options)
    if not isinstance(found, Path):
        raise UsageError(name, type(source).__name__, "a path, a torch.nn.Module or a dict of tensors")
    if found.is_dir() and not any(found.iterdir()):
        raise CheckpointError(f"{found} is an empty folder")
    holds = f"; it holds {_few(found)}" if found.is_dir() else ""
    raise UsageError(name, str(source), f"a checkpoint ({', '.join(one.name for one in formats)}){holds}")


def _path(name: str, source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    try:
        path.stat()
    except FileNotFoundError:
        raise UsageError(name, str(source), "a file or folder that exists") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(name, str(source), f"a file or folder that can be read ({reason})") from error
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise UsageError(name, str(source), "a folder that can be read (permission denied)")
    return path


def _few(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
) -> dict[str, tuple[ElementDifference | None, Explanation | None]]:
    """Return which elements of each tensor differ, and what happened to it, by the reference's name."""

    def tell(pair: Pair) -> tuple[ElementDifference | None, Explanation | None]:
        same_shape = pair.actual.shape == pair.expected.shape
        found = element_difference(pair.actual, pair.expected) if same_shape else None
        if not _one_dtype(pair):
            return found, _of_dtype(pair, surroundings)
        return found, explain_tensor(Case(pair.actual, pair.expected, found, surroundings))

    return {pair.expected.name: told for pair, told in in_parallel(tell, iter(pairs))}


def _of_dtype(pair: Pair, surroundings: Surroundings) -> Explanation | None:
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
    return Explanation(Cause.DTYPE_ROUNDED, evidence={"dtype": str(own).removeprefix("torch.")}) if changes else None


def _finding(
    pair: Pair, found: ElementDifference | None, story: Explanation | None, untied: Mapping[str, str]
) -> Finding:
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
        story = Explanation(Cause.TIED_WEIGHT_UNTIED, evidence={"tied_with": untied[expected.name]})
    if story is not None:
        evidence |= {"story": dict(story.evidence), "advice": story.cause.advise()}
    observed = float(found.count if found is not None else max(1, expected.numel))
    return Finding(CHECKPOINT_CHECK, where, observed, 0.0, story.cause.slug if story else None, evidence)


def _loose(one: Loose) -> Finding:
    side = "actual" if one.cause in (Cause.TENSOR_UNEXPECTED, Cause.TIED_WEIGHT_UNTIED) else "reference"
    evidence = {"only_in": side, "story": dict(one.evidence), "advice": one.cause.advise()}
    return Finding(CHECKPOINT_CHECK, {"parameter": one.name}, 1.0, 0.0, one.cause.slug, evidence)


def _torn(name: str, ranks: str) -> Finding:
    evidence = {"story": {"ranks": ranks}, "advice": Cause.REPLICA_DRIFT.advise()}
    return Finding(CHECKPOINT_CHECK, {"parameter": name}, 1.0, 0.0, Cause.REPLICA_DRIFT.slug, evidence)


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
