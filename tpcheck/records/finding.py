"""One failed check: what differs, where, by how much, why, and how to see it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer of a check that failed.

    Attributes:
        check: Name of the check, such as `gradients_match_reference`.
        where: Place of the difference; the keys that apply among `phase`, `step`, `module`, `parameter`, `field`,
            `ranks` and `index`.
        observed: Observed error. Relative Frobenius error where the oracle is calibrated; number of differing
            elements (or tensors, ranks) where it is exact.
        allowed: Largest error that passes, in the unit of `observed`; 0 where the oracle is exact.
        cause: Slug of the tested explanation, or None.
        evidence: Numbers and short texts behind `observed` and `cause`, JSON-able, by name.
        again: A command that shows the finding again.
    """

    check: str
    where: Mapping[str, Any]
    observed: float
    allowed: float
    cause: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    again: str | None = None

    @property
    def margin(self) -> float:
        """Observed error divided by the allowed one; below 1 passes."""
        if self.allowed:
            return self.observed / self.allowed
        return inf if self.observed else 0.0
