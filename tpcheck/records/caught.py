"""What came of one planted fault, or of one clean control."""

from __future__ import annotations

from collections.abc import Mapping
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
