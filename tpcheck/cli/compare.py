"""`tpcheck compare CANDIDATE.trace REFERENCE.trace`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.option_values import writable
from tpcheck.cli.results import Files, write_report
from tpcheck.cli.terminal import BAD_USAGE, usage_errors


def compare(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE.trace", help="The trace of the sharded model.")],
    reference: Annotated[str, typer.Argument(metavar="REFERENCE.trace", help="The trace of the unsharded model.")],
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the report as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as an HTML page.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every finding, and the checks that passed.")] = False,
) -> None:
    """Compare two traces that `tpcheck.record` has written in your training loop.

    \b
    tpcheck compare candidate.trace reference.trace

    Exit status: 0 they agree, 1 findings, 2 bad usage, a damaged trace, or nothing to compare.
    """
    with usage_errors():
        files = Files(writable("json", json_), writable("junit", junit), writable("html", html))
        from tpcheck.runs.comparing import compare_traces  # loads torch

        report = compare_traces(candidate, reference)
    is_written = write_report(report, files, verbose=verbose)
    status = {"passed": 0, "failed": 1}.get(report.verdict.verdict, BAD_USAGE)
    raise typer.Exit(status if is_written else BAD_USAGE)
