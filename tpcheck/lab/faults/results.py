"""The results of injected faults and clean controls, and the score of a table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONTROL = "clean control"
KINDS = (
    "forward collectives",
    "layout",
    "backward",
    "replicas",
    "norm and optimizer",
    "accumulation, losses, optimizers",
    "transformers' Trainer",
    "precision",
    "loss scale",
    "resume",
    "adapters",
    "hand-written TP",
    "losses",
    "initialisation",
    "data",
    "checkpoint",
)
"""The parts of training that faults are in, in the order of their tables."""


@dataclass(frozen=True, slots=True)
class FaultResult:
    """The result of one injected fault, or of one clean control.

    Attributes:
        fault: Name of the fault; family and options of a clean control.
        kind: The part of training that the fault is in; `clean control` for a control.
        what: What is wrong, in one sentence.
        verdict: The verdict of the run: `failed` is right for a fault, `passed` for a control.
        checks: The checks that failed, in order.
        place: Where the first finding points; None without one.
        true_places: Where the fault is.
        place_is_right: Whether `place` is one of them.
        cause: The cause of the first finding.
        true_causes: The right causes.
        cause_is_right: Whether `cause` is one of them.
        margin: Margin of the first finding; without one the worst margin of the run.
        dtype: The dtype of the run.
        seed: The seed of the draw and the run.
        seconds: Wall time.
        link: An upstream issue that reports such a bug.
        message: The backend's own message, after a crash.
        must_show: Whether the fault must show at this dtype.
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
    must_show: bool = True

    @property
    def is_control(self) -> bool:
        return self.kind == CONTROL

    @property
    def caught(self) -> bool:
        """Whether a check failed: right for a fault, a false positive for a control."""
        return self.verdict == "failed"

    @property
    def is_right(self) -> bool:
        """Whether a control passed, or a fault was caught at its place with a right cause."""
        if self.is_control:
            return self.verdict == "passed"
        return self.caught and self.place_is_right and self.cause_is_right


# Shares of the faults whose first finding must point to the right place, and name a right cause.
LEAST_PLACES, LEAST_CAUSES = 0.95, 0.90


@dataclass(frozen=True, slots=True)
class Score:
    """A summary of results.

    Attributes:
        faults: Faults that must show.
        hidden: Faults that need not show at this dtype.
        controls: Runs without an injected fault.
    """

    faults: tuple[FaultResult, ...]
    hidden: tuple[FaultResult, ...]
    controls: tuple[FaultResult, ...]

    @classmethod
    def of(cls, results: Iterable[FaultResult]) -> Score:
        listed = tuple(results)
        injected = [row for row in listed if not row.is_control]
        return cls(
            tuple(row for row in injected if row.must_show),
            tuple(row for row in injected if not row.must_show),
            tuple(row for row in listed if row.is_control),
        )

    @property
    def caught(self) -> tuple[FaultResult, ...]:
        return tuple(row for row in self.faults if row.caught)

    @property
    def right_places(self) -> int:
        return sum(row.place_is_right for row in self.faults)

    @property
    def right_causes(self) -> int:
        return sum(row.cause_is_right for row in self.faults)

    @property
    def false_positives(self) -> tuple[FaultResult, ...]:
        """Controls that did not pass, those that crashed included."""
        return tuple(row for row in self.controls if row.verdict != "passed")

    @property
    def least(self) -> FaultResult | None:
        """The caught fault with the smallest margin, of those at the dtype of most."""
        return min(_of_most(self.caught), key=lambda row: row.margin, default=None)

    @property
    def worst(self) -> FaultResult | None:
        """The clean run with the largest margin, of those at the dtype of most."""
        return max(_of_most(self.controls), key=lambda row: row.margin, default=None)

    @property
    def is_good(self) -> bool:
        """Whether all faults are caught, nearly all with the right place and cause, without a false positive."""
        number = len(self.faults)
        return (
            len(self.caught) == number
            and self.right_places >= LEAST_PLACES * number
            and self.right_causes >= LEAST_CAUSES * number
            and not self.false_positives
        )


def _of_most(rows: Sequence[FaultResult]) -> list[FaultResult]:
    """Return the rows without those of a dtype of their own, as bugs of float16 are: margins are larger in float64."""
    dtypes = Counter(row.dtype for row in rows if row.dtype != "any")
    of_most = {"any", *(dtype for dtype, _ in dtypes.most_common(1))}
    return [row for row in rows if row.dtype in of_most]
