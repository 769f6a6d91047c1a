"""Where output goes: colours and progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from tpcheck.errors import TpcheckError
from tpcheck.report.lines import Line, as_rich, as_text
from tpcheck.world.attach import is_launched

BAD_USAGE = 2


def show(lines: Iterable[Line]) -> None:
    """Write lines to standard output; NO_COLOR is kept."""
    console = Console()
    if console.is_terminal:
        console.print(as_rich(lines), soft_wrap=True)
    else:
        typer.echo(as_text(lines), nl=False)


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
    """Write a file so that a reader sees the old one or the new one, never a part."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
    ) as temporary:
        try:
            temporary.write(text)
            temporary.close()
            Path(temporary.name).chmod(0o666 & ~_umask())
            Path(temporary.name).replace(path)
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
