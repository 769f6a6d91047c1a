"""How far long work is: a bar on a terminal, plain lines or nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

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

from tpcheck.cli.terminal import note

Result = TypeVar("Result")


def told(
    results: Iterable[Result], total: int, *, name: Callable[[Result], str], line: Callable[[Result], str]
) -> Iterator[Result]:
    """Yield the results again: on a terminal a bar shows the name of the last, elsewhere each has its line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        for result in results:
            note(line(result))
            yield result
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total)
        for result in results:
            progress.update(task, advance=1, description=name(result))
            yield result


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
