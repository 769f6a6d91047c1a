"""Output: colours and progress bars on a terminal, plain lines elsewhere; files; and jobs that run concurrently."""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tpcheck.core.errors import TpcheckError
from tpcheck.core.extras import missing_package
from tpcheck.core.phases import listening
from tpcheck.report.report import FINDINGS_SHOWN, Report, verdict_lines
from tpcheck.report.words import Line, as_rich, as_text
from tpcheck.world.attach import is_launched, launched_rank

BAD_USAGE = 2
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def escape_unencodable_output() -> None:
    r"""Write `\u2713` where the encoding of the output has no such character, instead of failing after a long run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(lines: Iterable[Line]) -> None:
    """Write lines to standard output; NO_COLOR is kept.

    Raises:
        TpcheckError: They could not be written.
        BrokenPipeError: The reader of the output has closed it.
    """
    console = Console()
    with reporting_write_errors("standard output"):
        try:
            if console.is_terminal:
                console.print(as_rich(lines), soft_wrap=True)
            else:
                typer.echo(as_text(lines), nl=False)
        except OSError:
            _drop_unwritten_output()
            raise


def is_reporting_rank() -> bool:
    """Return whether this process writes output: without a launcher always, under a launcher rank 0 alone."""
    return not is_launched() or launched_rank(os.environ)[0] == 0


def note(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(text, err=True)


@contextmanager
def usage_errors(*, on_every_rank: bool = True) -> Iterator[None]:
    """Turn a TpcheckError, or a missing extra, into one line on standard error and the exit status of bad usage.

    Args:
        on_every_rank: Write what a launcher's rank raises; else rank 0 alone writes, which knows what any rank raised.
    """
    try:
        yield
    except TpcheckError as error:
        if on_every_rank or is_reporting_rank():
            note(f"tpcheck: {error}")
        raise typer.Exit(BAD_USAGE) from error
    except ModuleNotFoundError as error:
        if (sentence := missing_package(error)) is None:
            raise
        note(f"tpcheck: {sentence}")
        raise typer.Exit(BAD_USAGE) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old content or the new one, never a part.

    Raises:
        TpcheckError: It could not be written.
    """
    with reporting_write_errors(str(path)):
        if is_special(path):
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        else:
            _replace(path, text)


def is_special(path: Path) -> bool:
    """Return whether the path is a device or a pipe, such as /dev/stdout, which a rename would replace by a file."""
    return path.exists() and not path.is_file()


def _replace(path: Path, text: str) -> None:
    temporary = path.absolute().with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:  # names of files may be no UTF-8
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def reporting_write_errors(target: str) -> Iterator[None]:
    """Turn an OSError into a TpcheckError that names what could not be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TpcheckError(f"{target} cannot be written: {error.strerror or error}") from error


def _drop_unwritten_output() -> None:
    """Redirect standard output to /dev/null: the flush at exit would fail again, with a traceback."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@dataclass(frozen=True, slots=True)
class Files:
    """The files to write, in addition to standard output.

    Attributes:
        json: One report; the file of a matrix is written while it runs.
        summary: Markdown, appended to the file, as GitHub's step summary needs it.
    """

    json: Path | None = None
    junit: Path | None = None
    html: Path | None = None
    summary: Path | None = None


def write_report(report: Report, files: Files, *, verbose: bool) -> bool:
    """Show one report and write its files; return whether everything could be written."""
    lines = verdict_lines(report.verdict, findings_shown=None if verbose else FINDINGS_SHOWN)
    return write_all(lines, (files.json, report.to_json), (files.junit, report.to_junit), (files.html, report.to_html))


def write_all(lines: Iterable[Line], *files: tuple[Path | None, Callable[[], str]]) -> bool:
    """Show the lines and write each text that has a path, also after one has failed; return whether all succeeded."""
    writes = [partial(show, lines), *(partial(_write, *file) for file in files)]
    succeeded = [succeeds(write) for write in writes]
    return all(succeeded)


def _write(path: Path | None, to_text: Callable[[], str]) -> None:
    if path is not None:
        write_atomically(path, to_text())


def succeeds(write: Callable[[], None]) -> bool:
    """Call the function, and return whether it raised no TpcheckError; show the error."""
    try:
        write()
    except TpcheckError as error:
        note(f"tpcheck: {error}")
        return False
    return True


def append(path: Path, text: str) -> None:
    """Append text to a file.

    Raises:
        TpcheckError: It could not be written.
    """
    with reporting_write_errors(str(path)), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


_SILENT_S = 10.0  # a run that is over sooner shows its report alone


@contextmanager
def phases_shown() -> Iterator[None]:
    """Write what is done inside to standard error, where that takes longer than some seconds."""
    start = time.monotonic()

    def listener(text: str) -> None:
        seconds = time.monotonic() - start
        if seconds >= _SILENT_S:
            note(f"tpcheck: {seconds:.0f} s: {text}")

    with listening(listener):
        yield


Result = TypeVar("Result")


def with_progress(
    results: Iterable[Result], total: int, *, name: Callable[[Result], str], line: Callable[[Result], str]
) -> Iterator[Result]:
    """Yield the results; show a progress bar on a terminal, and a line for each result elsewhere."""
    with progress_bar("starting", total, MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as update:
        for result in results:
            if update is None:
                note(line(result))
            else:
                update(advance=1, description=name(result))
            yield result


@contextmanager
def bytes_bar(description: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that shows the bytes done on a terminal, or None where there is no terminal."""
    with progress_bar(description, None, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as update:
        yield None if update is None else lambda done, total: update(completed=done, total=total)


@contextmanager
def progress_bar(description: str, total: int | None, *columns: ProgressColumn) -> Iterator[Callable[..., None] | None]:
    """Yield what updates a progress bar with these columns (`rich.progress.Progress.update`), None without terminal."""
    console = Console(stderr=True)
    if not (console.is_terminal and is_reporting_rank()):
        yield None
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console, transient=True) as progress:
        yield partial(progress.update, progress.add_task(description, total=total))


def run_concurrently(jobs: Sequence[Callable[[], Result]], num_workers: int) -> Iterator[Result]:
    """Yield results in the order of completion, with at most `num_workers` jobs at a time. No job may raise."""
    if min(num_workers, len(jobs)) <= 1:  # in this thread, so that an interrupt reaches the running world
        yield from (job() for job in jobs)
        return
    waiting: queue.SimpleQueue[Callable[[], Result]] = queue.SimpleQueue()
    done: queue.SimpleQueue[Result] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def worker() -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            done.put(job())

    for _ in range(min(num_workers, len(jobs))):  # daemon threads: after an interrupt nothing waits for them
        threading.Thread(target=worker, daemon=True).start()
    for _ in jobs:
        yield done.get()
