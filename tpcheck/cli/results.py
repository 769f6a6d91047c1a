"""What is shown and written when all families have run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tpcheck.cli.many import Outcome
from tpcheck.cli.terminal import note, show, write_whole
from tpcheck.errors import TpcheckError
from tpcheck.report import SCHEMA, Report, as_junit
from tpcheck.report.lines import Line
from tpcheck.report.summary import summary_lines
from tpcheck.report.text import FINDINGS_SHOWN, verdict_lines


def tell(outcomes: Sequence[Outcome], *, verbose: bool, json_path: Path | None, junit_path: Path | None) -> bool:
    """Show the outcomes, and write the files that were asked for; return whether all of that could be written."""
    if len(outcomes) == 1 and outcomes[0].bad_usage:
        note(f"tpcheck: {outcomes[0].report.verdict.message}")
        return True
    writes = [lambda: show(_lines(outcomes, verbose))]
    if json_path:
        writes.append(lambda: write_whole(json_path, json.dumps(_data(outcomes), indent=2, allow_nan=False) + "\n"))
    if junit_path:
        writes.append(lambda: write_whole(junit_path, as_junit(outcome.report.verdict for outcome in outcomes)))
    return all_written(writes)


def tell_one(report: Report, *, verbose: bool, json_path: Path | None, junit_path: Path | None) -> bool:
    """Show one report, and write the files that were asked for; return whether all of that could be written."""
    writes = [lambda: show(verdict_lines(report.verdict, findings_shown=None if verbose else FINDINGS_SHOWN))]
    if json_path:
        writes.append(lambda: write_whole(json_path, report.to_json()))
    if junit_path:
        writes.append(lambda: write_whole(junit_path, report.to_junit()))
    return all_written(writes)


def all_written(writes: Sequence[Callable[[], None]]) -> bool:
    """Do every one of the writes, whatever became of the others, and return whether all could be done."""
    written = [_succeeds(write) for write in writes]
    return all(written)


def _succeeds(write: Callable[[], None]) -> bool:
    try:
        write()
    except TpcheckError as error:
        note(f"tpcheck: {error}")
        return False
    return True


def _lines(outcomes: Sequence[Outcome], verbose: bool) -> Iterator[Line]:
    """Yield the one report whole; of several, those that did not pass (all with `verbose`) and a table."""
    several = len(outcomes) > 1
    for outcome in outcomes:
        if verbose or not several or outcome.report.verdict.verdict in ("failed", "error"):
            yield from verdict_lines(outcome.report.verdict, findings_shown=None if verbose else FINDINGS_SHOWN)
            if several:
                yield Line()
    if several:
        yield from summary_lines([outcome.report.verdict for outcome in outcomes])


def _data(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    if len(outcomes) == 1:
        return outcomes[0].report.to_data()
    verdicts = {outcome.report.verdict.verdict for outcome in outcomes}
    worst = next(name for name in ("failed", "error", "passed", "skipped") if name in verdicts)
    return {"schema": SCHEMA, "verdict": worst, "reports": [outcome.report.to_data() for outcome in outcomes]}
