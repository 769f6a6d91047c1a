"""What came of each injected fault and clean control, and what a table of them comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Caught:
    """One row of the table of faults.

    Attributes:
        fault: Name of the fault; of the family and options for a clean control.
        kind: Which part of training it is in; `clean control` for a control.
        what: What is wrong, in one sentence.
        verdict: Of the run: a fault must fail, a control must pass.
        checks: The checks that found something, in their order.
        place: Where the first finding points, in words; None where there is none.
        true_places: Where it should.
        place_is_right: Whether it does.
        cause: The cause named for the first finding.
        true_causes: Those that are right.
        cause_is_right: Whether it is one of them.
        margin: Of the first finding; where nothing was found, the worst of all comparisons.
        dtype: Of the run.
        seed: Of the draw and the run.
        seconds: How long the run took.
        link: The real bug that it stands for.
        message: The backend's own message where it crashed.
        evidence: What the first finding rests on.
        must_show: Whether the fault shows at this dtype at all; always for a control.
    """

    fault: str
    kind: str
    what: str
    verdict: str
    checks: tuple[str, ...] = ()
    place: str | None = None
    true_places: tuple[str, ...] = ()
    place_is_right: bool = False
    cause: str | None = None
    true_causes: tuple[str | None, ...] = ()
    cause_is_right: bool = False
    margin: float = 0.0
    dtype: str = "float64"
    seed: int = 0
    seconds: float = 0.0
    link: str | None = None
    message: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    must_show: bool = True

    @property
    def is_control(self) -> bool:
        return self.kind == CONTROL

    @property
    def caught(self) -> bool:
        """Whether the fault was found; for a control, whether it cried."""
        return self.verdict == "failed"


CONTROL = "clean control"


LEAST_PLACES, LEAST_CAUSES = 0.95, 0.90  # shares of the faults whose first finding names a right place, a right cause


@dataclass(frozen=True, slots=True)
class Score:
    """A summary of the rows.

    Attributes:
        faults: Those that must show.
        hidden: Those that need not, at this dtype.
        controls: Runs in which nothing is planted.
    """

    faults: tuple[Caught, ...]
    hidden: tuple[Caught, ...]
    controls: tuple[Caught, ...]

    @classmethod
    def of(cls, rows: Iterable[Caught]) -> Score:
        listed = tuple(rows)
        planted = [row for row in listed if not row.is_control]
        return cls(
            tuple(row for row in planted if row.must_show),
            tuple(row for row in planted if not row.must_show),
            tuple(row for row in listed if row.is_control),
        )

    @property
    def caught(self) -> tuple[Caught, ...]:
        return tuple(row for row in self.faults if row.caught)

    @property
    def right_places(self) -> int:
        return sum(row.place_is_right for row in self.faults)

    @property
    def right_causes(self) -> int:
        return sum(row.cause_is_right for row in self.faults)

    @property
    def alarms(self) -> tuple[Caught, ...]:
        """Controls that did not pass; one that crashed has not passed."""
        return tuple(row for row in self.controls if row.verdict != "passed")

    @property
    def least(self) -> Caught | None:
        """The fault that stands out least."""
        return min(self.caught, key=lambda row: row.margin, default=None)

    @property
    def worst(self) -> Caught | None:
        """The clean run that comes closest to what is allowed."""
        return max(self.controls, key=lambda row: row.margin, default=None)

    @property
    def is_good(self) -> bool:
        """Whether all faults are caught, nearly all in place and by name, with no alarm."""
        number = len(self.faults)
        return (
            len(self.caught) == number
            and self.right_places >= LEAST_PLACES * number
            and self.right_causes >= LEAST_CAUSES * number
            and not self.alarms
        )


def by_kind(rows: Sequence[Caught]) -> dict[str, list[Caught]]:
    """Return the rows of each kind, in the order in which kinds first come."""
    kinds: dict[str, list[Caught]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    return kinds
