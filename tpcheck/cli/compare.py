"""`tpcheck compare CANDIDATE.trace REFERENCE.trace`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli.options import writable
from tpcheck.cli.results import tell_one
from tpcheck.cli.terminal import BAD_USAGE, usage_errors


def compare(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE.trace", help="Recorded with the sharded model.")],
    reference: Annotated[str, typer.Argument(metavar="REFERENCE.trace", help="Recorded with the unsharded model.")],
    json_: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the report as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as JUnit XML.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every finding, and the checks that passed.")] = False,
) -> None:
    """Compare two traces that `tpcheck.record` has written in training loops of your own.

    \b
    tpcheck compare candidate.trace reference.trace

    Exit status: 0 they agree, 1 findings, 2 bad usage, a damaged trace, or nothing that could be compared.
    """
    with usage_errors():
        json_, junit = writable("json", json_), writable("junit", junit)
        from tpcheck.runs.comparing import compare_traces  # loads torch, which --help and bad usage need not wait for

        report = compare_traces(candidate, reference)
    told = tell_one(report, verbose=verbose, json_path=json_, junit_path=junit)
    status = {"passed": 0, "failed": 1}.get(report.verdict.verdict, BAD_USAGE)
    raise typer.Exit(status if told else BAD_USAGE)
