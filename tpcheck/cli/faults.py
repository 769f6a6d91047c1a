"""`tpcheck faults [NAME...]`"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpcheck.cli.options import writable
from tpcheck.cli.results import all_written
from tpcheck.cli.terminal import BAD_USAGE, INTERRUPTED, note, show, side_by_side, told, usage_errors, write_whole
from tpcheck.core.errors import UsageError
from tpcheck.lab.faults.page import faults_html
from tpcheck.lab.faults.report import fault_lines, faults_data, faults_junit, listed_lines, row_line
from tpcheck.lab.faults.results import Caught, Score
from tpcheck.world.attach import is_launched

if TYPE_CHECKING:
    from tpcheck.lab.faults.table import Task


def faults(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Plant these faults alone; without, all of them.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(metavar="K", help="Plant the faults of this kind alone; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the models: float64, float32 or bfloat16.")] = "float64",
    seed: Annotated[int, typer.Option(help="Draws the layer, rank and topology of each fault.")] = 0,
    seeds: Annotated[int, typer.Option(metavar="N", help="Plant each fault so many times, each time elsewhere.")] = 1,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls", help="Run clean models, too. By default where no NAME and no kind is given."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side, each in a world of its own.")] = 1,
    list_: Annotated[bool, typer.Option("--list", help="Say what there is; run nothing.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the table as JSON.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="F", help="Write a page with the table and a picture of the margins.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write the table as JUnit XML.")] = None,
) -> None:
    """Plant every known bug, one at a time, and say who caught it, where, and which cause was named.

    A fault is planted in what is under test (the sharded model, the optimizer, the loader, the checkpoint),
    never in the reference. Clean controls are the same runs with nothing planted: there no check may cry.

    \b
    tpcheck faults                  # all, and the clean controls; some minutes
    tpcheck faults --kind checkpoint --kind data
    tpcheck faults row_parallel_reduce_skipped --seeds 5
    tpcheck faults --dtype bfloat16 --html faults.html --json faults.json
    tpcheck faults --list

    A row tells: caught or missed, the fault, the margin (observed / allowed error; "exact" where nothing is
    allowed), seconds, the first place named, the cause named, and the checks that failed.

    A place or cause that is named and not right is told below its row, with the right one.

    Exit status: 0 all faults are caught, 95 % at a right place and 90 % by a right cause, with no alarm on a clean
    control; 1 not so; 2 bad usage, or a file that cannot be written; 130 interrupted.
    """
    with usage_errors():
        _require_positive(jobs=jobs, seeds=seeds)
        if not 0 <= seed < 2**31 - seeds:
            raise UsageError("seed", seed, "a number from 0")
        if is_launched():
            raise UsageError("launcher", "torchrun or srun", "no launcher: each fault has a small world of its own")
        json_, html, junit = writable("json", json_), writable("html", html), writable("junit", junit)
        tasks = _tasks(names or [], kind or [], dtype, range(seed, seed + seeds), False if list_ else controls)
    if list_:
        show(listed_lines((task.name, task.kind, task.what) for task in tasks if task.seed == seed))
        raise typer.Exit
    start = time.monotonic()
    rows, whole = _run(tasks, jobs)
    score, seconds = Score.of(rows), time.monotonic() - start
    environment = _versions()
    writes = [lambda: show(fault_lines(score, seconds))]
    if json_:
        data = faults_data(score, environment, seconds)
        writes.append(lambda: write_whole(json_, json.dumps(data, indent=1, allow_nan=False) + "\n"))
    if html:
        writes.append(lambda: write_whole(html, faults_html(score, environment, seconds)))
    if junit:
        writes.append(lambda: write_whole(junit, faults_junit(score)))
    if not all_written(writes):
        raise typer.Exit(BAD_USAGE)
    raise typer.Exit((0 if score.is_good else 1) if whole else INTERRUPTED)


def _tasks(
    names: Sequence[str], kinds: Sequence[str], dtype: str, seeds: Iterable[int], controls: bool | None
) -> list[Task]:
    from tpcheck.lab.faults.table import control_tasks, fault_tasks  # loads torch, which --help need not wait for

    planted = fault_tasks(names, kinds, dtype=dtype, seeds=seeds)
    wanted = not names and not kinds if controls is None else controls
    return [*planted, *(control_tasks(dtype=dtype, seeds=seeds) if wanted else ())]


def _versions() -> Mapping[str, str]:
    from tpcheck.lab.faults.table import versions

    return versions()


def _run(tasks: Sequence[Task], jobs: int) -> tuple[list[Caught], bool]:
    """Return the rows, and whether all tasks were run: Ctrl-C keeps the rows of those that were."""
    rows: list[Caught] = []
    width = max(len(task.name) for task in tasks)
    try:
        rows.extend(_told(side_by_side([task.run for task in tasks], jobs), len(tasks), width))
    except KeyboardInterrupt:
        note("interrupted: what follows is what had been run")
    return rows, len(rows) == len(tasks)


def _told(rows: Iterable[Caught], total: int, width: int) -> Iterator[Caught]:
    return told(rows, total, name=lambda row: row.fault, line=lambda row: str(row_line(row, width)))


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(name, number, "a positive integer")
