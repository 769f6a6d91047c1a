"""What a check answers: how much it compared, what failed, and what it could not compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tpcheck.records import Suspect


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """Answer of one check, at one step or at the start.

    Attributes:
        margins: Observed / allowed error of everything compared, by name; 0 for exact agreement.
        suspects: What failed, the most telling first.
        missed: What could not be compared and why, by name.
    """

    margins: Mapping[str, float] = field(default_factory=dict)
    suspects: tuple[Suspect, ...] = ()
    missed: Mapping[str, str] = field(default_factory=dict)

    def sharpened(self, margins: Mapping[str, float], suspects: Iterable[Suspect]) -> CheckOutcome:
        """Return this answer, of a whole pass, with what modules showed one by one: that goes before it."""
        alone = {f"{name}, in a module by itself": margin for name, margin in margins.items()}
        own = tuple(replace(one, evidence={**one.evidence, "isolated": True}) for one in suspects)
        return replace(self, margins={**self.margins, **alone}, suspects=own or self.suspects)
