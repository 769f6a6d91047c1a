"""What a search among many configurations came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "refused", "known", "failed", "error"]
BAD: tuple[Status, ...] = ("failed", "error")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one example ended.

    Attributes:
        status: `passed`; `refused` (it cannot be run, and somebody said so); `known` (a registered upstream bug);
            `failed` (something differs); `error` (a crash that is no refusal).
        kind: Failures of one kind are shrunk together; of what is known, the name of the bug.
        reason: Why it was refused, or what was found, in a line.
        command: Repeats the example.
        data: What there is to show of a failure.
    """

    status: Status
    kind: str = ""
    reason: str = ""
    command: str = ""
    data: Any = None

    @property
    def is_bad(self) -> bool:
        return self.status in BAD


@dataclass(frozen=True, slots=True)
class Found:
    """The smallest example of one kind of failure.

    Attributes:
        outcome: How it ended.
        again: How it ended when it was run once more: only what comes again can be looked into.
        shrunk_from: The command of the first example that failed in this way.
    """

    outcome: Outcome
    again: Outcome
    shrunk_from: str = ""

    @property
    def comes_again(self) -> bool:
        return self.again.status == self.outcome.status


@dataclass(frozen=True, slots=True)
class Searched:
    """All examples of one search.

    Attributes:
        subject: What was searched, and within which bounds.
        outcomes: How each distinct example ended, in the order in which they were run; those that were run to shrink a
            failure left out.
        found: The smallest example of each kind of failure.
        num_shrinking: How many more were run to shrink.
        cut_short: Shrinking ended at its limit of time: a smaller example may exist.
        interrupted: Ctrl-C ended the search.
        environment: Versions by package.
    """

    subject: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    found: tuple[Found, ...] = ()
    num_shrinking: int = 0
    cut_short: bool = False
    interrupted: bool = False
    seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def count(self, *statuses: Status) -> int:
        return sum(outcome.status in statuses for outcome in self.outcomes)

    @property
    def num_ran(self) -> int:
        return len(self.outcomes) - self.count("refused")

    def reasons(self, status: Status) -> list[tuple[str, int]]:
        """Return what is said of the outcomes of this status, the most frequent first, and how often."""
        said = Counter(
            outcome.kind if status == "known" else outcome.reason
            for outcome in self.outcomes
            if outcome.status == status
        )
        return said.most_common()

    @property
    def verdict(self) -> Literal["passed", "failed", "error", "skipped"]:
        """Return what the search says in a word; `skipped` where nothing could be run."""
        statuses = {found.outcome.status for found in self.found}
        if "failed" in statuses:
            return "failed"
        if "error" in statuses:
            return "error"
        return "passed" if self.num_ran else "skipped"
