"""Every error that tpcheck raises on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tpcheck.core.guides import Guide

COLLECTIVES_DIFFER = "Detected mismatch between collectives"
"""In the message of torch's check of what ranks issue (ProcessGroupWrapper)."""


class TpcheckError(Exception):
    """Base of all errors raised by tpcheck."""


class UsageError(TpcheckError, ValueError):
    """An argument is wrong: the message has its name, its value, what is accepted, and the guide about it, if any.

    Example:
        >>> raise UsageError("tp", 0, "a positive integer")
        Traceback (most recent call last):
        ...
        tpcheck.core.errors.UsageError: tp=0: expected a positive integer
    """

    def __init__(self, name: str, value: object, accepted: str | Iterable[object], guide: Guide | None = None) -> None:
        if not isinstance(accepted, str):
            choices = [str(choice) for choice in accepted]
            accepted = f"one of {('; ' if any(', ' in choice for choice in choices) else ', ').join(choices)}"
        read_on = "" if guide is None else f"\nread on: {guide.url}"
        super().__init__(f"{name}={value!r}: expected {accepted}{read_on}")
        self.name = name
        self.value = value
        self.accepted = accepted
        self.guide = guide

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.value, self.accepted, self.guide)


class Mismatch(TpcheckError, AssertionError):
    """A comparison found a difference; `report` has every finding."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class BatchMismatch(Mismatch):
    """Ranks of a TP group got different batches, or DP replicas the same samples."""


class UnevenBatches(Mismatch):
    """Some ranks ran out of batches before the others."""


class BackendError(TpcheckError):
    """The system under test crashed: a verdict of `error`, never a mismatch."""


class InternalError(TpcheckError):
    """tpcheck itself failed, not the system under test; the message has the traceback."""


class CheckpointError(TpcheckError):
    """A checkpoint cannot be read: damaged, incomplete, hostile or of unknown format. The message says why."""


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """How one rank ended.

    Attributes:
        rank: Global rank.
        state: `returned`, `raised`, `died` (signal or exit code), `hung` (over the deadline) or `stopped` (ended by
            tpcheck because another rank failed).
        error_type: Qualified name of the exception's class, for `raised`.
        error: The exception's message, for `raised`.
        traceback: The rank's own traceback (`raised`) or Python stacks (`hung`, `stopped`), as text.
        exit_code: For `died` without a signal.
        signal: Name of the signal, such as `SIGKILL`, for `died` by a signal.
        collective: The torch.distributed call that the rank was waiting in, where it is known.
        place: The innermost line of code outside of libraries that the rank was at (`hung`, `stopped`).
        stdout: What the rank wrote to descriptor 1 during this run.
        stderr: What the rank wrote to descriptor 2 during this run.
        details: The `tpcheck_details` attribute of the exception (any picklable value).
    """

    rank: int
    state: Literal["returned", "raised", "died", "hung", "stopped"]
    error_type: str | None = None
    error: str | None = None
    traceback: str | None = None
    exit_code: int | None = None
    signal: str | None = None
    collective: str | None = None
    place: str | None = None
    stdout: str = ""
    stderr: str = ""
    details: Any = None


class RankFailure(TpcheckError):
    """A rank raised, died or hung.

    Attributes:
        first: The rank that failed first; the others failed or were stopped because of it.
        outcomes: How every rank ended, by rank.
        exception: The exception of the first rank where it could be pickled, else None.
    """

    def __init__(
        self, message: str, *, first: int, outcomes: tuple[RankOutcome, ...], exception: BaseException | None = None
    ) -> None:
        super().__init__(message)
        self.first = first
        self.outcomes = outcomes
        self.exception = exception

    def __reduce__(self) -> tuple[Any, ...]:
        first, outcomes, exception = self.first, self.outcomes, self.exception
        return partial(type(self), str(self), first=first, outcomes=outcomes, exception=exception), (), vars(self)
