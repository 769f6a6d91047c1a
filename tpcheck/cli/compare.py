"""`tpcheck compare ACTUAL.trace EXPECTED.trace`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.option_values import writable
from tpcheck.cli.results import Files, write_report
from tpcheck.cli.terminal import BAD_USAGE, usage_errors


def compare(
    actual: Annotated[str, typer.Argument(metavar="ACTUAL.trace", help="The trace of the run that is judged.")],
    expected: Annotated[str, typer.Argument(metavar="EXPECTED.trace", help="The trace that it should equal.")],
    more_actual: Annotated[
        list[str] | None,
        typer.Option("--actual", metavar="FOLDER", help="ACTUAL's folder on another node; repeatable."),
    ] = None,
    more_expected: Annotated[
        list[str] | None,
        typer.Option("--expected", metavar="FOLDER", help="EXPECTED's folder on another node; repeatable."),
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="REGEX=REPLACEMENT",
            help="Rename ACTUAL's modules and parameters, or name a ready map: hf-megatron; repeatable.",
        ),
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the report as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as an HTML page.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every finding.")] = False,
) -> None:
    """Find where two training runs first part, and whether that is rounding or a mistake.

    Any two that `tpcheck.record` has written: tp 1 and tp 2, tp 2 and tp 8, two versions, two dtypes, two frameworks,
    a run and itself. Record at least one of them with replays=2, which measures what rounding may do:

    \b
    with tpcheck.record(model, "tp2.trace", optimizer=optimizer, replays=2):
        train()

    \b
    tpcheck compare tp2.trace tp1.trace
    tpcheck compare tp2.trace tp1.trace --html runs.html
    tpcheck compare node0.trace,node1.trace tp1.trace
    tpcheck compare mine.trace theirs.trace --map '^net[.]=model.'
    tpcheck compare megatron.trace llama.trace --map hf-megatron

    Exit status: 0 they agree, 1 findings, 2 bad usage, a damaged trace, or nothing that can be decided.
    """
    with usage_errors():
        files = Files(writable("json", json_), writable("junit", junit), writable("html", html))
        from tpcheck.runs.comparing import compare_traces  # loads torch
        from tpcheck.runs.names import parse_maps

        report = compare_traces(
            _folders(actual, more_actual), _folders(expected, more_expected), names=parse_maps(map_ or [])
        )
    is_written = write_report(report, files, verbose=verbose)
    status = {"passed": 0, "failed": 1}.get(report.verdict.verdict, BAD_USAGE)
    raise typer.Exit(status if is_written else BAD_USAGE)


def _folders(path: str, more: list[str] | None) -> list[str]:
    """Return the folders: a path that exists is one, even with a comma in its name."""
    first = [path] if Path(path).exists() else [part for part in path.split(",") if part]
    return [*first, *(more or [])]
