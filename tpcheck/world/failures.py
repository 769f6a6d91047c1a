"""How a rank fails: what travels to the controller, which rank was first, and the text of a `RankFailure`."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any

from tpcheck.core.errors import RankOutcome
from tpcheck.world.channel import dumps, loads
from tpcheck.world.messages import Failure
from tpcheck.world.output import is_announcement

# gloo, NCCL and torch's stores raise plain RuntimeError for most of what can happen to a connection.
_WORDS = re.compile(
    r"connection (closed by peer|reset by peer|refused)|broken pipe|socket timeout|timed out (waiting|after)|"
    r"wait timeout|failed to pass monitoredbarrier|/gloo/transport/|remote process exited|"
    r"nccl (error|communicator was aborted)|"
    r"tcpstore|heartbeat",
    re.IGNORECASE,
)


def is_communication(error: BaseException) -> bool:
    """Tell whether this exception, or one that it was raised from or during, is about the connection to other ranks."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if _is_communication(link):
            return True
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def _is_communication(error: BaseException) -> bool:
    if any(
        base.__name__ == "DistError" for base in type(error).__mro__
    ):  # torch.distributed's own, without importing it
        return True
    return isinstance(error, (RuntimeError, ConnectionError, EOFError)) and _WORDS.search(str(error)) is not None


class Kind(IntEnum):
    """Ways to fail, the most telling first: arrival order alone would often name a victim."""

    DIED = 0
    RAISED = 1
    CAME_BACK_TWICE = 2
    LOST_CONNECTION = 3
    HUNG = 4
    HUNG_IN_COLLECTIVE = 5


@dataclass(frozen=True, slots=True)
class Symptom:
    """How and when (on the machine's monotonic clock) one rank failed."""

    kind: Kind
    at: float
    rank: int


def first_failed(symptoms: Iterable[Symptom]) -> int:
    """Return the rank whose failure explains the others."""
    return min(symptoms, key=lambda symptom: (symptom.kind, symptom.at, symptom.rank)).rank


_OWN_MODULES = "tpcheck.world.rank_main"


def failure_of(error: BaseException) -> Failure:
    """Return all that can be told of the exception; nothing it does when it is printed or pickled can raise here."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    details = getattr(error, "tpcheck_details", None)
    return Failure(
        error_type=name,
        error=_text(error),
        traceback=_traceback(error),
        is_communication=is_communication(error),
        exception=_pickled(error),
        details=None if details is None else _pickled(details),
    )


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:
        return f"<its own str() raised {type(broken).__name__}>"


def _traceback(error: BaseException) -> str:
    try:
        lines = traceback.format_exception(type(error), error, _without_own_frames(error.__traceback__))
    except Exception:
        lines = traceback.format_tb(error.__traceback__)
    return "".join(lines)


def _without_own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames that called the user's function; keep all where there are no others."""
    link = trace
    while link is not None and link.tb_frame.f_globals.get("__name__") == _OWN_MODULES:
        link = link.tb_next
    return link or trace


def _pickled(value: Any) -> bytes | None:
    """Return the value as bytes that are known to load again, else None."""
    try:
        pickled = dumps(value)
        loads(pickled)
    except Exception:
        return None
    return pickled


_LINES_OF_CULPRIT = 100
_LINES_OF_OTHERS = 15
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+), in (?P<function>.*)$')
# What a rank is in while it makes an exception ready to travel: the function itself is over.
_REPORTING = ("/tpcheck/world/failure.py", "/tpcheck/pytest_plugin/rank_failure.py")
_LIBRARY = (
    "/tpcheck/world/",
    "/tpcheck/pytest_plugin/",
    "/site-packages/",
    "/dist-packages/",
    "/lib/python",
    "<frozen",
    "<string>",
)


def failure_text(outcomes: tuple[RankOutcome, ...], *, first: int, timeout: float | None) -> str:
    """Return the whole report of a failed run."""
    culprit = outcomes[first]
    others = [outcome for outcome in outcomes if outcome.rank != first]
    parts = [f"rank {first} of {len(outcomes)} {_headline(culprit, timeout)}"]
    if culprit.traceback:
        parts.append(culprit.traceback.rstrip())
    if others:
        parts.append("\n".join(f"rank {outcome.rank}: {one_line(outcome, culprit)}" for outcome in others))
    parts += [f"rank {other.rank}:\n{other.traceback}" for other in others if other.state == "hung" and other.traceback]
    parts += _captured(culprit, _LINES_OF_CULPRIT)
    for other in others:
        parts += _captured(other, _LINES_OF_OTHERS)
    return "\n\n".join(parts)


def _headline(outcome: RankOutcome, timeout: float | None) -> str:
    if outcome.state == "raised":
        return _raised(outcome)
    if outcome.state == "died":
        return _died(outcome)
    limit = "" if timeout is None else f" within {timeout:g} s"
    return f"hung: no answer{limit}, {_activity(outcome)}"


def one_line(outcome: RankOutcome, culprit: RankOutcome) -> str:
    """Return how a rank ended that is not the culprit."""
    if outcome.state == "returned":
        return "had returned"
    if outcome.state == "raised":
        same = (outcome.error_type, outcome.error) == (culprit.error_type, culprit.error)
        return f"raised the same {outcome.error_type}" if same else _raised(outcome)
    if outcome.state == "died":
        return _died(outcome)
    if outcome.state == "stopped" and _is_reporting(outcome):
        return "was raising, too"
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
        return "at a place it did not show"
    what = f"waiting in {outcome.collective}" if outcome.collective else "not in a collective"
    place = _place(outcome.traceback)
    return f"{what}, at {place}" if place else what


def _place(stack: str) -> str | None:
    """Return the innermost place in the user's own code, else in any code."""
    frames = _frames(stack)
    own = [frame for frame in frames if not any(part in frame["file"] for part in _LIBRARY)]
    if not frames:
        return None
    frame = (own or frames)[-1]
    return f"{frame['file']}:{frame['line']} in {frame['function']}"


def _is_reporting(outcome: RankOutcome) -> bool:
    return any(frame["file"].endswith(_REPORTING) for frame in _frames(outcome.traceback or ""))


def _frames(stack: str) -> list[re.Match[str]]:
    return [match for line in stack.splitlines() if (match := _FRAME.match(line))]


def _captured(outcome: RankOutcome, num_lines: int) -> list[str]:
    streams = (("stdout", outcome.stdout), ("stderr", outcome.stderr))
    return [
        f"captured {name} of rank {outcome.rank}:\n{_last(text, num_lines)}" for name, text in streams if text.strip()
    ]


def _last(text: str, num_lines: int) -> str:
    lines = text.rstrip().splitlines()
    cut = [lines.pop(0)] if is_announcement(lines[0]) else []
    if len(lines) <= num_lines:
        return "\n".join([*cut, *lines])
    return "\n".join([*cut, f"... ({len(lines) - num_lines} lines more)", *lines[-num_lines:]])
