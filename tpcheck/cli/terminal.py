"""Where output goes: colours and progress on a terminal, plain lines elsewhere; and running work side by side."""

from __future__ import annotations

import io
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import typer
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

from tpcheck.core.errors import TpcheckError
from tpcheck.report.words import Line, as_rich, as_text
from tpcheck.world.attach import is_launched

BAD_USAGE = 2
INTERRUPTED = 130  # what shells say of a command that Ctrl-C ended


def escape_what_the_terminal_cannot_show() -> None:
    r"""Write `\u2713` where the encoding has no such character (ASCII, Latin-1), rather than fail after a long run.

    The same for names of files that are no text in that encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(lines: Iterable[Line]) -> None:
    """Write lines to standard output; NO_COLOR is kept.

    Raises:
        TpcheckError: They could not be written. A reader that has gone is no error of ours, and passes as it is.
    """
    console = Console()
    with _told_of("standard output"):
        try:
            if console.is_terminal:
                console.print(as_rich(lines), soft_wrap=True)
            else:
                typer.echo(as_text(lines), nl=False)
        except OSError:
            _drop_unwritten_output()
            raise


def speaks() -> bool:
    """Return whether this process tells what was found: of the ranks that a launcher started, the first alone."""
    return not is_launched() or int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def note(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(text, err=True)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn tpcheck's own errors into one sentence and the exit status of bad usage."""
    try:
        yield
    except TpcheckError as error:
        note(f"tpcheck: {error}")
        raise typer.Exit(BAD_USAGE) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Raises:
        TpcheckError: It could not be written.
    """
    with _told_of(str(path)):
        if is_special(path):
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        else:
            _replace(path, text)


def is_special(path: Path) -> bool:
    """Return whether the path leads to a device or pipe, such as /dev/stdout: a file in its place would hide it."""
    return path.exists() and not path.is_file()


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w",
        encoding="utf-8",
        errors="backslashreplace",  # of a file's name that is no text
        dir=path.absolute().parent,
        prefix=f".{path.name}.",
        delete=False,
    ) as temporary:
        try:
            temporary.write(text)
            temporary.close()
            Path(temporary.name).chmod(0o666 & ~_umask())
            Path(temporary.name).replace(path)
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise


@contextmanager
def _told_of(target: str) -> Iterator[None]:
    """Say what could not be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TpcheckError(f"{target} cannot be written: {error.strerror or error}") from error


def _drop_unwritten_output() -> None:
    """Let the interpreter's last flush go nowhere: it would fail again, with a traceback of its own."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def side_by_side(works: Sequence[Callable[[], Result]], jobs: int) -> Iterator[Result]:
    """Yield results as they are reached, with at most `jobs` at a time. None of the works raises."""
    if min(jobs, len(works)) <= 1:  # in this thread, so that an interrupt reaches the world that runs
        yield from (work() for work in works)
        return
    waiting: queue.SimpleQueue[Callable[[], Result]] = queue.SimpleQueue()
    done: queue.SimpleQueue[Result] = queue.SimpleQueue()
    for work in works:
        waiting.put(work)

    def labour() -> None:
        while True:
            try:
                work = waiting.get_nowait()
            except queue.Empty:
                return
            done.put(work())

    for _ in range(min(jobs, len(works))):  # daemons: after an interrupt nothing waits for them
        threading.Thread(target=labour, daemon=True).start()
    for _ in works:
        yield done.get()
