"""Which rank failed first: the culprit, not its victims."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


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
