"""Open checkpoints by their format and compare two of them: names, shapes, dtypes, ties and every bit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, ReadOptions
from tpcheck.backends.registry import checkpoint_formats
from tpcheck.checkpoints.adapters import differing_options
from tpcheck.checkpoints.division import Division
from tpcheck.checkpoints.mapped import renamed
from tpcheck.checkpoints.names import Matching, UnmatchedName, read_with_best_names, unmatched_names
from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.errors import CheckpointError, UsageError
from tpcheck.core.findings import Coverage, Finding
from tpcheck.core.name_maps import READY_MAPS, NameMap
from tpcheck.core.paths import existing_path
from tpcheck.numerics.checks import CHECKPOINT_CHECK
from tpcheck.numerics.exact.checkpoint_tensor import (
    BitComparer,
    CheckpointTensor,
    ElementDifference,
    element_difference,
)
from tpcheck.numerics.exact.explain import Context, explain_tensor
from tpcheck.report.checkpoint_page import StoredTensor, TensorState


def open_checkpoint(argument: str, source: Any, options: ReadOptions) -> Checkpoint:
    """Return the checkpoint at a path or in a live object, opened by the first format that recognises it.

    Args:
        argument: The caller's argument, for error messages: `actual`, `reference` or `earlier`.

    Raises:
        UsageError: Nothing is at the path, or no format recognises it.
        CheckpointError: The files are damaged, hostile or incomplete.
    """
    source = existing_path(argument, source) if isinstance(source, (str, os.PathLike)) else source
    formats = checkpoint_formats()
    for checkpoint_format in formats:
        if checkpoint_format.recognises(source):
            return checkpoint_format.open(source, options)
    if not isinstance(source, Path):
        raise UsageError(argument, type(source).__name__, "a path, a torch.nn.Module or a dict of tensors")
    names = sorted(entry.name for entry in source.iterdir()) if source.is_dir() else []
    if source.is_dir() and not names:
        raise CheckpointError(f"{source} is an empty folder.")
    below = _checkpoints_below(source) if source.is_dir() else []
    if below:
        listed = ", ".join(below[:5]) + (f" and {len(below) - 5} more" if len(below) > 5 else "")
        raise UsageError(argument, str(source), f"a folder that holds a checkpoint itself; below it are {listed}")
    contents = f"; the folder holds {', '.join(names[:5])}" if names else ""
    contents += f" and {len(names) - 5} more" if len(names) > 5 else ""
    accepted = ", ".join(checkpoint_format.name for checkpoint_format in formats)
    raise UsageError(argument, str(source), f"a checkpoint ({accepted}){contents}")


# Folders that hold checkpoints: a Trainer's output (checkpoint-500), a repository in the cache of the hub
# (snapshots/REVISION), and what accelerate and others write (step_10/model).
_DEPTH_SEARCHED, _FOLDERS_SEARCHED = 2, 200


def _checkpoints_below(folder: Path) -> list[str]:
    """Return the folders below this one that hold a checkpoint, the latest first."""
    formats = checkpoint_formats()
    found: list[Path] = []
    level = [folder]
    for _ in range(_DEPTH_SEARCHED):
        level = [path for parent in level for path in _folders_in(parent)][:_FOLDERS_SEARCHED]
        found += [path for path in level if any(each.recognises(path) for each in formats)]
        level = [path for path in level if path not in found]
    by_number = sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)] or [0])
    return [str(path.relative_to(folder)) for path in reversed(by_number)]


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


_KINDS_OF_WEIGHTS = ("safetensors", "pytorch", "peft", "transformers-shards")


def other_weights(source: Any) -> tuple[str, tuple[str, ...]]:
    """Return which format is read of a folder, and which other files of weights it holds."""
    if not isinstance(source, (str, os.PathLike)) or not Path(source).is_dir():
        return "", ()
    names = [each.name for each in checkpoint_formats() if each.recognises(Path(source))]
    kinds = tuple(name for name in names[1:] if name in _KINDS_OF_WEIGHTS)
    return (names[0], kinds) if names and names[0] in _KINDS_OF_WEIGHTS else ("", ())


T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called with the number of bytes compared so far and the total."""

_PIECES_PER_TASK = 8  # cores get even shares, and there are few tasks


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of the actual checkpoint and its counterpart in the reference."""

    actual: CheckpointTensor
    expected: CheckpointTensor

    @property
    def same_shape(self) -> bool:
        return self.actual.shape == self.expected.shape

    @property
    def same_dtype(self) -> bool:
        return self.actual.dtype == self.expected.dtype


def differing_pairs(
    pairs: Sequence[TensorPair], division: Division, progress: Progress | None = None
) -> tuple[TensorPair, ...]:
    """Return the pairs whose bits differ, of pairs that have one shape and one dtype.

    Raises:
        CheckpointError: A file does not hold what it should.
    """
    total = sum(pair.expected.nbytes for pair in pairs)
    differing: set[int] = set()
    done = 0
    with BitComparer() as comparer:

        def equal(task: tuple[int, TensorPair, range]) -> bool:
            number, pair, rows = task
            return number in differing or comparer.equal_rows(pair.actual, pair.expected, rows)

        spans = division.share(_row_spans(pairs))
        for (number, pair, rows), is_equal in map_in_threads(equal, spans, division.num_threads):
            if not is_equal:
                differing.add(number)
            done += len(rows) * (pair.expected.nbytes // pair.expected.num_rows)
            if progress is not None:
                progress(min(total, done * division.count), total)
    by_process = division.exchange(f"the bits of {len(pairs)} tensors", differing)
    return tuple(pairs[number] for number in sorted(set().union(*by_process)))


def _row_spans(pairs: Sequence[TensorPair]) -> Iterator[tuple[int, TensorPair, range]]:
    for number, pair in enumerate(pairs):
        pieces = pair.expected.pieces()
        while together := list(islice(pieces, _PIECES_PER_TASK)):
            yield number, pair, range(together[0].start, together[-1].stop)


def map_in_threads(function: Callable[[T], R], values: Iterator[T], num_threads: int) -> Iterator[tuple[T, R]]:
    """Yield (value, function(value)) in the order of completion.

    Values are drawn as threads become free, so a long iterator needs no memory.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        running: dict[Future[R], T] = {pool.submit(function, value): value for value in islice(values, 2 * num_threads)}
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing two checkpoints.

    Attributes:
        findings: One for each tensor that is not the reference's, in the reference's order.
        coverage: How many tensors could be compared.
        renamed: How names were matched where they are not equal, in words.
        names: Of the reference's tensors, as they were compared: of an adapter alone, those that PEFT gives it.
        tensors: Every tensor of the reference, then those that `actual` alone has.
    """

    findings: tuple[Finding, ...]
    coverage: Coverage
    renamed: tuple[str, ...]
    names: tuple[str, ...]
    tensors: tuple[StoredTensor, ...] = ()


def compare_checkpoints(
    actual: Checkpoint,
    expected: Checkpoint,
    *,
    cast: torch.dtype | None = None,
    actual_cast: torch.dtype | None = None,
    earlier: Mapping[str, Checkpoint] | None = None,
    names: NameMap | None = None,
    division: Division | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare every tensor to the bit.

    Args:
        cast: The dtype that floating point values of `expected` are rounded to first: an intended cast.
        actual_cast: The same for `actual`, which may hold master weights of higher precision.
        earlier: Checkpoints of earlier steps, with the names of `expected`, to recognise weights that were not updated.
        names: Renames tensors before they are matched.
        division: Of the work over processes, which all call this; None for all of it.
        progress: Called with the number of bytes compared so far and the total.

    Raises:
        CheckpointError: A file does not hold what it should.
    """
    division = division or Division.over(None)
    if names is not None:
        actual, expected = renamed(actual, names, is_actual=True), renamed(expected, names, is_actual=False)
        steps = (earlier or {}).items()
        earlier = {step: renamed(checkpoint, names, is_actual=False) for step, checkpoint in steps}
    actual, expected, matching = read_with_best_names(actual, expected)
    pairs = [
        TensorPair(CheckpointTensor(actual, actual_name, actual_cast), CheckpointTensor(expected, name, cast))
        for name, actual_name in matching.actual_of.items()
    ]
    same_kind = [pair for pair in pairs if pair.same_shape and pair.same_dtype]
    differing = {pair.expected.name for pair in differing_pairs(same_kind, division, progress)}
    equal = {pair.expected.name for pair in same_kind} - differing
    wrong = [pair for pair in pairs if pair.expected.name not in equal]
    replicas = actual.inconsistent_replicas
    findings = [_inconsistent(name, replicas[name]) for name in expected.names() if name in replicas]
    findings += explained_findings(wrong, expected, earlier or {}, dict(_tied_partners(expected, equal)), division)
    # What cannot be read is there, so it is neither missing nor unexpected.
    unreadable = {*actual.unread, *expected.unread, *actual.inconsistent_replicas, *expected.inconsistent_replicas}
    unmatched = [name for name in unmatched_names(actual, expected, matching, cast) if name.name not in unreadable]
    fitting = _fitting_map(actual, expected, matching) if unmatched and names is None else None
    findings += [_unmatched(name, fitting) for name in unmatched]
    findings += [_other_option(name, *values) for name, values in differing_options(actual, expected).items()]
    for checkpoint in (actual, expected, *(earlier or {}).values()):
        checkpoint.require_unchanged()
    count = {"count_tensors": len(expected.names())}
    return Comparison(
        tuple(replace(finding, evidence={**finding.evidence, **count}) for finding in findings),
        _coverage(actual, expected, unmatched, matching.left_out),
        matching.renamed,
        tuple(expected.names()),
        tuple(_stored_tensors(actual, expected, pairs, equal, {name.name: _only_in(name) for name in unmatched})),
    )


def _stored_tensors(
    actual: Checkpoint, expected: Checkpoint, pairs: Sequence[TensorPair], equal: Set[str], only_in: Mapping[str, str]
) -> Iterator[StoredTensor]:
    """Yield every tensor with what the comparison found."""
    compared = {pair.expected.name for pair in pairs} | actual.inconsistent_replicas.keys()
    readable = frozenset(expected.names())
    for name in dict.fromkeys([*expected.names(), *expected.unread]):
        state: TensorState = "not compared"
        if name in equal:
            state = "equal"
        elif name in only_in:
            state = "missing"
        elif name in compared:
            state = "different"
        yield _stored(expected, name, state) if name in readable else StoredTensor(name, state)
    for name, side in only_in.items():
        if side == "actual":
            yield _stored(actual, name, "unexpected")


def _stored(checkpoint: Checkpoint, name: str, state: TensorState) -> StoredTensor:
    return StoredTensor(name, state, tuple(checkpoint.shape(name)), _dtype_name(checkpoint.dtype(name)))


def _only_in(name: UnmatchedName) -> str:
    return "actual" if name.cause in (Cause.TENSOR_UNEXPECTED, Cause.TIED_WEIGHT_UNTIED) else "reference"


def explained_findings(
    pairs: Sequence[TensorPair],
    reference: Checkpoint,
    earlier: Mapping[str, Checkpoint],
    tied_to: Mapping[str, str],
    division: Division,
) -> tuple[Finding, ...]:
    """Return a finding for each of the pairs, which are known to differ, with its explanation."""
    with BitComparer() as comparer:

        def finding(pair: TensorPair) -> Finding:
            difference = element_difference(pair.actual, pair.expected) if pair.same_shape else None
            context = Context(pair.actual, pair.expected, difference, reference, earlier, comparer)
            explanation = explain_tensor(context) if pair.same_dtype else _explain_other_dtype(context)
            if explanation is None and pair.expected.name in tied_to:
                tie = {"tied_with": tied_to[pair.expected.name]}
                explanation = Explanation(Cause.TIED_WEIGHT_UNTIED, evidence=tie)
            return _finding(pair, difference, explanation)

        own = tuple(division.share(pairs))
        results = map_in_threads(finding, iter(own), division.num_threads)
        finding_of = {pair.expected.name: result for pair, result in results}
    return division.joined("the causes", [finding_of[pair.expected.name] for pair in own])


def _explain_other_dtype(context: Context) -> Explanation | None:
    """Explain a tensor of another dtype: it is the reference rounded to that dtype, or differs from that, too."""
    actual, dtype = context.actual, context.actual.dtype
    rounded = replace(context.expected, cast=dtype)
    if rounded.dtype != dtype:
        return None  # a floating point number in place of an integer
    difference = element_difference(actual, rounded) if actual.shape == rounded.shape else None
    if actual.shape != rounded.shape or difference is not None:
        return explain_tensor(replace(context, expected=rounded, difference=difference))
    if context.difference is None:
        return None  # every value survives the rounding
    return Explanation(Cause.DTYPE_ROUNDED, evidence={"dtype": _dtype_name(dtype)})


def _finding(pair: TensorPair, difference: ElementDifference | None, explanation: Explanation | None) -> Finding:
    actual, expected = pair.actual, pair.expected
    where: dict[str, Any] = {"parameter": expected.name}
    evidence: dict[str, Any] = {}
    if actual.name != expected.name:
        evidence["actual_name"] = actual.name
    if not pair.same_shape:
        evidence |= {"shape_actual": list(actual.shape), "shape_expected": list(expected.shape)}
    if not pair.same_dtype:
        evidence |= {"dtype_actual": _dtype_name(actual.dtype), "dtype_expected": _dtype_name(expected.dtype)}
        evidence["same_values"] = difference is None and pair.same_shape
    if difference is not None:
        where["index"] = list(difference.first)
        evidence |= {
            "count_differing": difference.count,
            "count_total": difference.total,
            "actual": _jsonable(difference.actual),
            "expected": _jsonable(difference.expected),
            "largest": difference.largest,
            "largest_at": list(difference.largest_at),
        }
    if explanation is not None:
        facts = {**explanation.evidence, "parameter": expected.name}
        evidence |= {"story": dict(explanation.evidence), "advice": explanation.cause.advise(facts)}
    observed = float(difference.count if difference is not None else max(1, expected.numel))
    cause = explanation.cause.slug if explanation else None
    return Finding(CHECKPOINT_CHECK, where, observed, 0.0, cause, evidence)


def _fitting_map(actual: Checkpoint, expected: Checkpoint, matching: Matching) -> str | None:
    """Return the ready map under which every name of both sides has a counterpart, or fewest have none."""
    alone: dict[str | None, int] = {None: len(matching.missing) + len(matching.unexpected)}
    for ready in READY_MAPS:
        names = NameMap.of(ready=[ready])
        with suppress(UsageError):  # two tensors get one name
            sides = renamed(actual, names, is_actual=True), renamed(expected, names, is_actual=False)
            *_, mapped = read_with_best_names(*sides)
            alone[ready] = len(mapped.missing) + len(mapped.unexpected)
    return min(alone, key=lambda ready: alone[ready])


def _unmatched(name: UnmatchedName, fitting_map: str | None) -> Finding:
    """Return the finding about a name that one side has.

    Args:
        fitting_map: The ready map under which more names have a counterpart, if there is one.
    """
    advice = name.cause.advise({**name.evidence, "fitting_map": fitting_map})
    evidence = {"only_in": _only_in(name), "story": dict(name.evidence), "advice": advice}
    return Finding(CHECKPOINT_CHECK, {"parameter": name.name}, 1.0, 0.0, name.cause.slug, evidence)


def _other_option(name: str, actual: Any, expected: Any) -> Finding:
    values = {"actual": actual, "expected": expected}
    shown = {side: json.dumps(value) if isinstance(value, (dict, list)) else value for side, value in values.items()}
    advice = (
        "Save the configuration that the adapter was trained with: equal tensors make another model under this one."
    )
    evidence = {**shown, "counted": ("value", "differs", "differ"), "advice": advice}
    return Finding(CHECKPOINT_CHECK, {"field": f"{name} in adapter_config.json"}, 1.0, 0.0, None, evidence)


def _inconsistent(name: str, reason: str) -> Finding:
    evidence = {"story": {"ranks": reason}, "advice": Cause.REPLICA_DRIFT.advise()}
    return Finding(CHECKPOINT_CHECK, {"parameter": name}, 1.0, 0.0, Cause.REPLICA_DRIFT.slug, evidence)


def _coverage(
    actual: Checkpoint, expected: Checkpoint, unmatched: Sequence[UnmatchedName], left_out: Mapping[str, str]
) -> Coverage:
    """Return how many of the reference's tensors were compared; a tie that is stored once counts as compared."""
    missed = {f"{name} of actual": why for name, why in actual.unread.items()}
    not_read = (*expected.unread.items(), *expected.inconsistent_replicas.items())
    missed |= {f"{name} of the reference": why for name, why in not_read}
    missed |= left_out
    names = frozenset(expected.names())
    without_counterpart = {name.name for name in unmatched} | set(actual.unread)
    return Coverage(
        len(names - without_counterpart), len(names | actual.unread.keys() | expected.unread.keys()), missed
    )


def _tied_partners(expected: Checkpoint, equal: Set[str]) -> Iterator[tuple[str, str]]:
    """Yield every name that the reference ties to one whose tensor is equal, with that one."""
    for tie in expected.ties:
        for name in tie:
            partner = next((other for other in sorted(tie) if other != name and other in equal), None)
            if partner is not None:
                yield name, partner


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, complex) else value


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
