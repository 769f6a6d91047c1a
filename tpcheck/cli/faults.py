"""`tpcheck faults [NAME...]`"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpcheck.cli.option_values import full_dtype, writable
from tpcheck.cli.terminal import (
    BAD_USAGE,
    INTERRUPTED,
    note,
    run_concurrently,
    show,
    usage_errors,
    with_progress,
    write_all,
)
from tpcheck.core.errors import UsageError
from tpcheck.lab.faults.report import fault_lines, fault_list, faults_html, faults_json, faults_junit, progress_line
from tpcheck.lab.faults.results import KINDS, FaultResult, Score
from tpcheck.model.options import COMMON_DTYPES
from tpcheck.world.attach import is_launched

if TYPE_CHECKING:
    from tpcheck.lab.faults.runs import FaultRun


def faults(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Faults to inject.", show_default="all")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(metavar="K", help="Inject only faults of this kind; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the models: float64, float32 or bfloat16.")] = "float64",
    seed: Annotated[int, typer.Option(help="Selects the layer, rank and topology of each fault.")] = 0,
    seeds: Annotated[int, typer.Option(metavar="N", help="Inject each fault N times, with N seeds.")] = 1,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls", help="Also run clean models.", show_default="unless a NAME or a kind is given"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Number of concurrent runs, each in its own world.")] = 1,
    list_: Annotated[bool, typer.Option("--list", help="List the faults and run nothing.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the table as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="F", help="Write the table as an HTML page.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write the table as JUnit XML.")] = None,
) -> None:
    """Inject every known bug, one at a time, and show which check found it, where, and the cause it named.

    A fault is injected into the system under test (the sharded model, the optimizer, the data loader, the
    checkpoint), never into the reference. Clean controls are the same runs without a fault: any finding there
    is a false positive.

    \b
    tpcheck faults                  # all faults and the clean controls; some minutes
    tpcheck faults --kind checkpoint --kind data
    tpcheck faults row_parallel_reduce_skipped --seeds 5
    tpcheck faults --dtype bfloat16 --html faults.html --json faults.json
    tpcheck faults --list

    Each row shows: caught or missed, the fault, the margin (observed / allowed error; "exact" for an exact
    check), seconds, the first place, the cause, and the checks that failed. Below a row with a wrong place or
    cause stands the right one.

    Exit status: 0 if all faults are caught, 95 % at a right place and 90 % with a right cause, without a false
    positive; 1 otherwise; 2 bad usage, or a file that cannot be written; 130 interrupted.
    """
    with usage_errors():
        _require_positive(jobs=jobs, seeds=seeds)
        if not 0 <= seed < 2**31 - seeds:
            raise UsageError("seed", seed, "a number from 0")
        if is_launched():
            raise UsageError("launcher", "torchrun or srun", "no launcher: each fault runs in its own small world")
        json_, html, junit = writable("json", json_), writable("html", html), writable("junit", junit)
        _require_known(kind or [], full_dtype(dtype))
        with_controls = False if list_ else controls
        runs = _runs(names or [], kind or [], full_dtype(dtype), range(seed, seed + seeds), with_controls)
    if list_:
        show(fault_list((run.name, run.kind, run.what) for run in runs if run.seed == seed))
        raise typer.Exit
    start = time.monotonic()
    results, is_complete = _run(runs, jobs)
    score, seconds = Score.of(results), time.monotonic() - start
    environment = _versions()
    is_written = write_all(
        fault_lines(score, seconds),
        (json_, lambda: faults_json(score, environment, seconds)),
        (html, lambda: faults_html(score, environment, seconds)),
        (junit, lambda: faults_junit(score)),
    )
    if not is_written:
        raise typer.Exit(BAD_USAGE)
    raise typer.Exit((0 if score.is_good else 1) if is_complete else INTERRUPTED)


def _runs(
    names: Sequence[str], kinds: Sequence[str], dtype: str, seeds: Iterable[int], controls: bool | None
) -> list[FaultRun]:
    from tpcheck.lab.faults.runs import control_runs, fault_runs  # loads torch, which --help need not wait for

    with_controls = not names and not kinds if controls is None else controls
    injected = fault_runs(names, kinds, dtype=dtype, seeds=seeds)
    return [*injected, *(control_runs(dtype=dtype, seeds=seeds) if with_controls else ())]


def _versions() -> Mapping[str, str]:
    from tpcheck.lab.faults.runs import versions

    with redirect_stdout(sys.stderr):  # DeepSpeed prints when it is imported
        return versions()


def _run(runs: Sequence[FaultRun], num_workers: int) -> tuple[list[FaultResult], bool]:
    """Return the results, and whether all runs completed: Ctrl-C keeps the results so far."""
    results: list[FaultResult] = []
    width = max(len(run.name) for run in runs)
    try:
        results.extend(
            with_progress(
                run_concurrently([run.run for run in runs], num_workers),
                len(runs),
                name=lambda result: result.fault,
                line=lambda result: str(progress_line(result, width)),
            )
        )
    except KeyboardInterrupt:
        note("interrupted: the table shows the runs that completed")
    return results, len(results) == len(runs)


def _require_known(kinds: Sequence[str], dtype: str) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError("kind", kind, KINDS)
    if dtype not in COMMON_DTYPES:
        raise UsageError("dtype", dtype, COMMON_DTYPES)


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(name, number, "a positive integer")
