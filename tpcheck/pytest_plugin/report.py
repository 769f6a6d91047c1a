"""How a run over ranks looks in pytest's report: from the outcomes of ranks to sections and tracebacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tpcheck.errors import RankFailure, RankOutcome
from tpcheck.pytest_plugin.verdict import Origin, origin_of
from tpcheck.world.failure_text import one_line


def captured_sections(
    outcomes: Iterable[RankOutcome], excinfo: pytest.ExceptionInfo[BaseException] | None
) -> list[tuple[str, str]]:
    """Return what ranks printed, under titles that --show-capture and JUnit sort by."""
    if excinfo is not None and isinstance(excinfo.value, RankFailure):
        return []  # its message holds them
    return [
        (f"Captured {name} rank {outcome.rank}", text)
        for outcome in outcomes
        for name, text in (("stdout", outcome.stdout), ("stderr", outcome.stderr))
        if text.strip()
    ]


def failure_repr(excinfo: pytest.ExceptionInfo[BaseException], own: Any) -> Any:
    """Return what to show for the exception; `own` is what pytest made of it."""
    error = excinfo.value
    origin = origin_of(error)
    if origin is None:
        return _with_members(error, own)
    if origin.details is None:  # a rank died or hung: there is only what the others saw of it
        return excinfo.getrepr(style="value")
    shown = origin.details.longrepr
    _add_notes(shown, _new_notes(error, origin))
    shown.addsection(_title(origin), _others(origin))
    return shown


def _with_members(error: BaseException, own: Any) -> Any:
    """Add what ranks told, where Hypothesis found several failures and made a group of them."""
    for member in getattr(error, "exceptions", ()):
        origin = origin_of(member)
        if origin is not None and origin.details is not None and hasattr(own, "addsection"):
            _add_notes(origin.details.longrepr, _new_notes(member, origin))
            own.addsection(_title(origin), f"{origin.details.longrepr}\n{_others(origin)}")
    return own


def _new_notes(error: BaseException, origin: Origin) -> list[str]:
    """Return the notes that came to the exception in pytest's process: in one, Hypothesis tells the failing example."""
    notes: list[str] = getattr(error, "__notes__", [])
    return notes[origin.num_notes :]


def _add_notes(shown: Any, notes: Iterable[str]) -> None:
    """Add notes where pytest shows those it knows of: below the exception's message."""
    entries = shown.reprtraceback.reprentries
    lines: list[str] = getattr(entries[-1], "lines", []) if entries else []
    lines += [f"E   {line}" for note in notes for line in note.splitlines()]


def _title(origin: Origin) -> str:
    return f"rank {origin.outcome.rank} of {len(origin.failure.outcomes)} {origin.outcome.state}; the others"


def _others(origin: Origin) -> str:
    return "\n".join(
        f"rank {outcome.rank}: {one_line(outcome, origin.outcome)}"
        for outcome in origin.failure.outcomes
        if outcome is not origin.outcome
    )
