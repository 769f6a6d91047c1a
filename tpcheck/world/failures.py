"""How a rank fails: what it sends to the controller, which rank failed first, and the text of a `RankFailure`."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType

from tpcheck.core.errors import RankFailure, RankOutcome
from tpcheck.world.channel import dumps_or_none
from tpcheck.world.messages import SerializedException
from tpcheck.world.output import is_truncation_notice

# gloo, NCCL and torch's stores raise plain RuntimeError for most failures of a connection.
_COMMUNICATION_ERROR = re.compile(
    r"connection (closed by peer|reset by peer|refused)|broken pipe|socket timeout|timed out (waiting|after)|"
    r"wait timeout|failed to pass monitoredbarrier|/gloo/transport/|remote process exited|"
    r"nccl (error|communicator was aborted)|"
    r"tcpstore|heartbeat",
    re.IGNORECASE,
)


def is_communication(error: BaseException) -> bool:
    """Return whether this exception, or one that it was raised from or during, says that another rank failed."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if _is_communication(link):
            return True
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def _is_communication(error: BaseException) -> bool:
    if any(base.__name__ == "DistError" for base in type(error).__mro__):  # torch.distributed's, without importing it
        return True
    return isinstance(error, RankFailure) or (
        isinstance(error, (RuntimeError, ConnectionError, EOFError))
        and _COMMUNICATION_ERROR.search(str(error)) is not None
    )


class FailureKind(IntEnum):
    """How a rank failed. A lower value explains a higher one on another rank: the order of arrival alone does not."""

    DIED = 0
    RAISED = 1
    REPORTED_TWICE = 2
    LOST_CONNECTION = 3
    SUSPENDED = 4  # has not written its stack, which every process that runs does, whatever it waits for
    HUNG = 5
    HUNG_IN_COLLECTIVE = 6


@dataclass(frozen=True, slots=True)
class Symptom:
    """How and when (on the machine's monotonic clock) one rank failed."""

    kind: FailureKind
    at: float
    rank: int


def first_failed(symptoms: Iterable[Symptom]) -> int:
    """Return the rank whose failure explains those of the others."""
    return min(symptoms, key=lambda symptom: (symptom.kind, symptom.at, symptom.rank)).rank


def serialized_exception(error: BaseException) -> SerializedException:
    """Return the exception as a message; an exception whose `str()` or pickling raises does not raise here."""
    cls = type(error)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    details = getattr(error, "tpcheck_details", None)
    return SerializedException(
        error_type=name,
        error=_text(error),
        traceback=_traceback(error),
        is_communication=is_communication(error),
        exception=dumps_or_none(error),
        details=None if details is None else dumps_or_none(details),
    )


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as str_error:
        return f"<str() of the exception raised {type(str_error).__name__}>"


def _traceback(error: BaseException) -> str:
    try:
        lines = traceback.format_exception(type(error), error, _without_callers(error.__traceback__))
    except Exception:
        lines = traceback.format_tb(error.__traceback__)
    return "".join(lines)


def _without_callers(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames of tpcheck that called the user's code; where there is none of it, those that serve the rank."""
    return _behind(trace, "tpcheck") or _behind(trace, "tpcheck.world.rank_main") or trace


def _behind(trace: TracebackType | None, package: str) -> TracebackType | None:
    """Return what follows the frames of a package with which a traceback begins."""
    link = trace
    while link is not None and f"{link.tb_frame.f_globals.get('__name__')}.".startswith(f"{package}."):
        link = link.tb_next
    return link


_OUTPUT_LINES_OF_FIRST = 100
_OUTPUT_LINES_OF_OTHERS = 15


def failure_text(outcomes: tuple[RankOutcome, ...], *, first: int, timeout: float | None) -> str:
    """Return the message of a failed run: the rank that failed first, then the others, then what they printed."""
    first_outcome = outcomes[first]
    others = [outcome for outcome in outcomes if outcome.rank != first]
    parts = [f"rank {first} of {len(outcomes)} {_headline(first_outcome, timeout)}"]
    if first_outcome.traceback:
        parts.append(first_outcome.traceback.rstrip())
    if others:
        parts.append("\n".join(f"rank {outcome.rank}: {one_line(outcome, first_outcome)}" for outcome in others))
    parts += [f"rank {hung.rank}:\n{hung.traceback}" for hung in others if hung.state == "hung" and hung.traceback]
    parts += _captured(first_outcome, _OUTPUT_LINES_OF_FIRST)
    for outcome in others:
        parts += _captured(outcome, _OUTPUT_LINES_OF_OTHERS)
    return "\n\n".join(parts)


def _headline(outcome: RankOutcome, timeout: float | None) -> str:
    if outcome.state == "raised":
        return _raised(outcome)
    if outcome.state == "died":
        return _died(outcome)
    limit = "" if timeout is None else f" within {timeout:g} s"
    activity = _activity(outcome) if outcome.traceback is not None else "the process is suspended (no stack)"
    return f"hung: no answer{limit}, {activity}"


def one_line(outcome: RankOutcome, first: RankOutcome) -> str:
    """Return how a rank ended; `first` is the outcome of the rank that failed first."""
    if outcome.state == "returned":
        return "had returned"
    if outcome.state == "raised":
        if outcome.error_type is None:
            return "raised, too (stopped before it could report the exception)"
        same = (outcome.error_type, outcome.error) == (first.error_type, first.error)
        return f"raised the same {outcome.error_type}" if same else _raised(outcome)
    if outcome.state == "died":
        return _died(outcome)
    return f"{'stopped while' if outcome.state == 'stopped' else 'hung'} {_activity(outcome)}"


def _raised(outcome: RankOutcome) -> str:
    first_line = (outcome.error or "").partition("\n")[0]
    return f"raised {outcome.error_type}: {first_line}" if first_line else f"raised {outcome.error_type}"


def _died(outcome: RankOutcome) -> str:
    if outcome.signal is not None:
        return f"died: killed by {outcome.signal}"
    return f"died: exited with code {outcome.exit_code} before it answered"


def _activity(outcome: RankOutcome) -> str:
    if outcome.traceback is None:
        return "at an unknown place (no stack)"
    activity = f"waiting in {outcome.collective}" if outcome.collective else "not in a collective"
    return f"{activity}, at {outcome.place}" if outcome.place else activity


def _captured(outcome: RankOutcome, num_lines: int) -> list[str]:
    streams = (("stdout", outcome.stdout), ("stderr", outcome.stderr))
    return [
        f"captured {name} of rank {outcome.rank}:\n{_last(text, num_lines)}" for name, text in streams if text.strip()
    ]


def _last(text: str, num_lines: int) -> str:
    lines = text.rstrip().splitlines()
    notice = [lines.pop(0)] if is_truncation_notice(lines[0]) else []
    if len(lines) <= num_lines:
        return "\n".join([*notice, *lines])
    return "\n".join([*notice, f"... ({len(lines) - num_lines} earlier lines)", *lines[-num_lines:]])
