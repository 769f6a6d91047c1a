"""How far long work is: a bar on a terminal, plain lines or nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tpcheck.cli.many import Outcome
from tpcheck.cli.terminal import note
from tpcheck.report.summary import summary_line


def with_progress(outcomes: Iterable[Outcome], families: list[str]) -> Iterator[Outcome]:
    """Yield the outcomes again, and tell of each on standard error."""
    width = max(len(family) for family in families)
    console = Console(stderr=True)
    if not console.is_terminal:
        for outcome in outcomes:
            note(str(summary_line(outcome.report.verdict, width)))
            yield outcome
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("verify", total=len(families))
        for outcome in outcomes:
            progress.update(task, advance=1, description=outcome.family)
            yield outcome


@contextmanager
def bytes_bar(description: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show on a terminal how many bytes of how many are done, and how fast; elsewhere there is nothing to tell."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
