"""One thing that is wrong, or that will not do what it seems to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """What a rule of the doctor found.

    Attributes:
        rule: Name of the rule.
        what: What is so, and what comes of it.
        fix: What to do, where there is something to do: a line to add, a command.
        link: Where more is written.
    """

    rule: str
    what: str
    fix: str | None = None
    link: str | None = None
