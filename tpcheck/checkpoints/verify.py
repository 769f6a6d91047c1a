"""`tpcheck.verify_checkpoint`: check the arguments, open both checkpoints, compare them, make a report."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tpcheck.core.environment import package_versions
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import CheckResult, Coverage, Verdict
from tpcheck.core.name_maps import NameMap, Names
from tpcheck.core.reproduce import checkpoint_command
from tpcheck.report.checkpoint_page import StoredTensors
from tpcheck.report.report import Report
from tpcheck.world.attach import num_local_ranks

if TYPE_CHECKING:
    import torch

    from tpcheck.backends.checkpoint_format import Checkpoint
    from tpcheck.checkpoints.comparison import Comparison
    from tpcheck.checkpoints.states import StatesComparison
    from tpcheck.world.rank import Rank

CASTS = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


def verify_checkpoint(
    actual: Any,
    reference: Any,
    *,
    dtype: str | torch.dtype | None = None,
    earlier: Sequence[Any] = (),
    allow_pickle: bool = False,
    weights_only: bool = False,
    names: Names = None,
    rank: Rank | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare a checkpoint with a reference: names, shapes, dtypes, buffers, ties, and every bit.

    The parts that several ranks saved are put together first. Where both sides hold the states of the optimizer, the
    scheduler, the loss scaler and the generators, those are compared, too. Memory stays below a gigabyte whatever the
    size.

    Args:
        actual: A file or folder of any installed format (safetensors, transformers' shards, pytorch_model.bin, torch
            DCP, DeepSpeed training and universal checkpoints, PEFT adapters, Megatron torch_dist), or a live module,
            DeepSpeed engine, or dict of tensors.
        reference: The same, of the model that `actual` should be.
        dtype: An intended cast: floating point values of the reference are rounded to it before they are compared.
        earlier: Checkpoints of earlier steps, to recognise weights that were not updated since.
        allow_pickle: Unpickle classes that are not known to be harmless, in a separate process.
        weights_only: Compare the model alone.
        names: Patterns and replacements that turn names of `actual` into those of `reference`, or names of ready
            maps, as for `compare_traces`.
        rank: This process's place among the ranks of a launcher, as `tpcheck.attach` returns it: they divide the
            reading, and each returns the same report. Collective; all need the same paths.
        progress: Called with the number of bytes compared so far and the total.

    Raises:
        UsageError: There is no checkpoint, or `dtype` is not a dtype to cast to.
        CheckpointError: Files are damaged, hostile or incomplete.

    Example:
        >>> import torch
        >>> weights = {"head.weight": torch.arange(8.0).reshape(4, 2)}
        >>> report = verify_checkpoint({"head.weight": weights["head.weight"][:2]}, weights)
        >>> report.findings[0].cause, report.findings[0].evidence["story"]
        ('shard_missing', {'dim': 0, 'tp_rank': 0, 'tp': 2, 'from': 0})
    """
    from tpcheck.backends.checkpoint_format import ReadOptions
    from tpcheck.checkpoints.comparison import compare_checkpoints, open_checkpoint
    from tpcheck.checkpoints.division import Division
    from tpcheck.checkpoints.states import compare_states

    start = time.monotonic()
    cast = _cast(dtype)
    name_map = NameMap.from_argument(names)
    options = ReadOptions(allow_pickle=allow_pickle)
    division = Division.over(rank, 1 if rank is None else num_local_ranks(os.environ, rank.world_size))
    with ExitStack() as stack:
        stack.enter_context(division.in_lockstep())

        def open_until_end(argument: str, source: Any) -> Checkpoint:
            checkpoint = open_checkpoint(argument, source, options)
            stack.callback(checkpoint.close)
            return checkpoint

        actual_checkpoint = open_until_end("actual", actual)
        expected_checkpoint = open_until_end("reference", reference)
        steps = {_name(source, number): open_until_end("earlier", source) for number, source in enumerate(earlier)}
        for side, checkpoint in (("actual", actual_checkpoint), ("the reference", expected_checkpoint)):
            division.require_same(side, _digest_of_contents(checkpoint))
        comparison = compare_checkpoints(
            actual_checkpoint,
            expected_checkpoint,
            cast=cast,
            earlier=steps,
            names=name_map if name_map.texts else None,
            division=division,
            progress=progress,
        )
        comparison = _with_other_weights(comparison, {"actual": actual, "the reference": reference})
        if not weights_only:
            wrong = {str(finding.where.get("parameter")) for finding in comparison.findings}
            comparison = _with_states(
                comparison, compare_states(actual_checkpoint, expected_checkpoint, wrong, division)
            )
        subject: dict[str, Any] = {
            "subject": _name(actual),
            "actual": actual_checkpoint.description,
            "reference": f"{_name(reference)} ({expected_checkpoint.description})",
            **({"dtype": str(cast).removeprefix("torch.")} if cast is not None else {}),
            **({"weights_only": True} if weights_only else {}),
            **({"map": list(name_map.texts)} if name_map.texts else {}),
            "names": list(comparison.renamed),
        }
    command = checkpoint_command(
        _paths(actual, reference),
        subject.get("dtype"),
        _paths(*earlier),
        allow_pickle,
        weights_only=weights_only,
        maps=name_map.texts,
    )
    verdict = _verdict(comparison, subject, command, time.monotonic() - start)
    return Report(verdict, StoredTensors(comparison.tensors))


def _verdict(comparison: Comparison, subject: dict[str, Any], command: str | None, seconds: float) -> Verdict:
    from tpcheck.numerics.checks import CHECKPOINT_CHECK

    findings = tuple(replace(finding, again=command) for finding in comparison.findings)
    compared = comparison.coverage.compared
    skipped = not compared and not findings
    return Verdict(
        verdict="skipped" if skipped else "failed" if findings else "passed",
        subject=subject,
        environment=package_versions(),
        findings=findings,
        checks=(CheckResult(CHECKPOINT_CHECK, compared, 0.0),),
        coverage=comparison.coverage,
        seconds=seconds,
        message="no tensor could be compared" if skipped else None,
    )


def _with_other_weights(comparison: Comparison, sources: Mapping[str, Any]) -> Comparison:
    """Say of a folder with two kinds of weights which was read."""
    from tpcheck.checkpoints.comparison import other_weights

    left_out: dict[str, str] = {}
    for side, source in sources.items():
        read, others = other_weights(source)
        left_out |= {f"{other} weights of {side}": f"{read} is read where a folder holds both" for other in others}
    coverage = comparison.coverage
    not_compared = {**coverage.not_compared, **left_out}
    return replace(comparison, coverage=replace(coverage, not_compared=not_compared))


def _with_states(comparison: Comparison, states: StatesComparison) -> Comparison:
    coverage = comparison.coverage
    return replace(
        comparison,
        findings=(*comparison.findings, *states.findings),
        coverage=Coverage(
            coverage.compared + states.compared,
            coverage.total + states.total,
            {**coverage.not_compared, **states.not_compared},
        ),
    )


def _digest_of_contents(checkpoint: Checkpoint) -> str:
    names = checkpoint.names()
    contents = [(name, tuple(checkpoint.shape(name)), str(checkpoint.dtype(name))) for name in names]
    return hashlib.sha256(repr(contents).encode(errors="surrogateescape")).hexdigest()


def _cast(dtype: str | torch.dtype | None) -> torch.dtype | None:
    import torch

    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in CASTS:
        raise UsageError("dtype", name, CASTS)
    cast: torch.dtype = getattr(torch, name)
    return cast


def _name(source: Any, number: int | None = None) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return f"live {type(source).__name__}" + ("" if number is None else f" {number}")


def _paths(*sources: Any) -> tuple[str, ...] | None:
    """Return the sources as words of a command; None where one is not a path."""
    paths = tuple(os.fspath(source) for source in sources if isinstance(source, (str, os.PathLike)))
    return paths if len(paths) == len(sources) else None
