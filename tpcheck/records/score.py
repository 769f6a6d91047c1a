"""What a table of faults and clean controls comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tpcheck.records.caught import Caught

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
