"""A problem, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """A problem that a rule found.

    Attributes:
        rule: Name of the rule.
        what: The problem and its consequence.
        fix: What to do: a line to add, a command; None for a problem without a fix.
        link: Where to read more.
    """

    rule: str
    what: str
    fix: str | None = None
    link: str | None = None
