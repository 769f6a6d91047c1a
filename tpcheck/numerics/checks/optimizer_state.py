"""Are the optimizer's moments and float32 masters the reference's?"""

from __future__ import annotations

from dataclasses import replace

import torch

from tpcheck.numerics.checks.suspects import (
    DECAYED_OR_NOT,
    ComparedParameter,
    may_be_decayed_or_not,
    parameter_suspect,
)
from tpcheck.numerics.differences import compare_parameter, rounding_error
from tpcheck.numerics.evidence import CheckOutcome, Evidence, Kind, StepFacts, Suspect

_CHECK = "optimizer_state_matches_reference"


def optimizer_state_matches_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare what the optimizer holds for each parameter after `step`: moments, and masters. Calibrated.

    A state that has no element for each of the parameter's (a step count, the factors of a moment) is not compared.
    """
    margins: dict[str, float] = {}
    not_compared: dict[str, str] = {}
    wrong: list[tuple[str, ComparedParameter]] = []
    for (state, name), expected in evidence.reference[step].optimizer_state.items():
        label, layout = f"{state} of {name}", evidence.layouts.get(name)
        parts = [rank.optimizer_state.get((state, name)) for rank in evidence.candidate[step]]
        present = tuple(part for part in parts if part is not None)
        if layout is None or len(present) < len(parts):
            not_compared[label] = "the backend does not give this state of every rank"
            continue
        if [tuple(part.shape) for part in present] != list(layout.local_shapes):
            not_compared[label] = "its shape is not that of the parameter's shard"
            continue
        allowed = evidence.tolerance.allowed((step, "state", state, name), rounding_error(expected))
        difference = compare_parameter(layout, expected, present, allowed)
        if not difference.agrees and may_be_decayed_or_not(evidence, step, name):
            not_compared[label] = DECAYED_OR_NOT
            continue
        margins[label] = difference.margin
        if not difference.agrees:
            wrong.append((state, ComparedParameter(name, expected, present, layout.parts(expected), difference)))
    suspects = tuple(_suspect(evidence, step, state, compared, len(wrong)) for state, compared in wrong)
    return CheckOutcome(margins, suspects, not_compared)


def _suspect(evidence: Evidence, step: int, state: str, compared: ComparedParameter, num_wrong: int) -> Suspect:
    details = {"first_of": num_wrong, "state": state}
    if not torch.isfinite(compared.expected).all():
        details["note"] = "the reference's state is not finite"
    where = {"phase": "update", "step": step}
    kind: Kind = "master" if state == "master" else "state"  # a weight that is a multiple is so by chance
    suspect = parameter_suspect(evidence, compared, check=_CHECK, kind=kind, where=where, details=details)
    if state != "master":
        return suspect
    return replace(suspect, step=StepFacts(before=_masters_before(evidence, step, compared)))


def _masters_before(evidence: Evidence, step: int, compared: ComparedParameter) -> tuple[torch.Tensor, ...]:
    """Return each rank's part of the expected master before `step`, which starts as the weight."""
    name, layout = compared.name, evidence.layouts[compared.name]
    earlier = (reference.optimizer_state.get(("master", name)) for reference in reversed(evidence.reference[:step]))
    before = next((master for master in earlier if master is not None), evidence.initial[name])
    return tuple(part.to(compared.expected.dtype) for part in layout.parts(before))
