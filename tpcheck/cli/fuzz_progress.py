"""How far a search is: a bar on a terminal, a line for each example elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tpcheck.cli.terminal import note
from tpcheck.records.fuzzed import Outcome
from tpcheck.report.fuzz import outcome_line


@contextmanager
def telling(total: int) -> Iterator[Callable[..., None]]:
    """Yield what is to be called with each outcome.

    A backend that is imported meanwhile, as DeepSpeed, may speak: standard output is for what was found alone.
    """
    with redirect_stdout(sys.stderr), _told(total) as told:
        yield told


@contextmanager
def _told(total: int) -> Iterator[Callable[..., None]]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda outcome, *, shrinking: note(str(outcome_line(outcome, shrinking=shrinking)))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total)

        def told(outcome: Outcome, *, shrinking: bool) -> None:
            ran = int(not shrinking and outcome.status != "refused")
            progress.update(task, advance=ran, description="shrinking" if shrinking else outcome.status)

        yield told
