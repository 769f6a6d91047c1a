"""Runs one verification after another, or some side by side; a crash of one never ends the others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tpcheck.errors import UsageError
from tpcheck.records import Verdict
from tpcheck.report import Report

Verify = Callable[[str], Report]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the verification of one family ended.

    Attributes:
        family: Its name.
        report: Its report; a crash has one, too.
        bad_usage: The options did not fit this family.
    """

    family: str
    report: Report
    bad_usage: bool = False


def run_all(families: Sequence[str], verify: Verify, jobs: int) -> Iterator[Outcome]:
    """Yield outcomes as they are reached, with at most `jobs` at a time."""
    if min(jobs, len(families)) == 1:  # in this thread, so that an interrupt reaches the world that runs
        yield from (_outcome(family, verify) for family in families)
        return
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for family in families:
        waiting.put(family)

    def work() -> None:
        while True:
            try:
                family = waiting.get_nowait()
            except queue.Empty:
                return
            done.put(_outcome(family, verify))

    for _ in range(min(jobs, len(families))):  # daemons: after an interrupt nothing waits for them
        threading.Thread(target=work, daemon=True).start()
    for _ in families:
        yield done.get()


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Return 2 if the options did not fit some family, else 1 after findings, else 3 after a crash, else 0."""
    verdicts = {outcome.report.verdict.verdict for outcome in outcomes}
    if any(outcome.bad_usage for outcome in outcomes):
        return 2
    return 1 if "failed" in verdicts else 3 if "error" in verdicts else 0


def _outcome(family: str, verify: Verify) -> Outcome:
    start = time.monotonic()
    try:
        return Outcome(family, verify(family))
    except Exception as error:
        message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        verdict = Verdict("error", {"family": family}, {}, seconds=time.monotonic() - start, message=message)
        return Outcome(family, Report(verdict), bad_usage=isinstance(error, UsageError))
