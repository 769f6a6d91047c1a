"""Is every parameter's gradient the reference's, missing ones included?"""

from __future__ import annotations

from typing import Any

from tpcheck.checks.activations import ComparedActivations, compare_activations
from tpcheck.checks.localise import first_divergences, scope_of
from tpcheck.checks.outcome import CheckOutcome, named_few
from tpcheck.checks.outputs import activation_suspect
from tpcheck.checks.parameters import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.compare import own_rounding
from tpcheck.records import Evidence, Suspect

_CHECK = "gradients_match_reference"


def gradients_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare the gradients of all parameters and activations of `step`. Calibrated.

    Each gradient that is wrong although its module was given the right inputs and output gradients is a finding of
    its own; those that are wrong in consequence are named in the first finding.
    """
    backward = compare_activations(evidence, step, "backward")
    parameters, missed = compare_parameters(
        evidence,
        evidence.reference[step].gradients,
        [part.gradients for part in evidence.candidate[step]],
        lambda name, whole: evidence.tolerance.allowed((step, "gradient", name), own_rounding(whole)),
    )
    margins = {**backward.margins(), **{name: one.found.margin for name, one in parameters.items()}}
    wrong = [one for one in parameters.values() if not one.found.agrees]
    suspects = _roots(evidence, step, backward, wrong) or _consequences(evidence, step, wrong)
    return CheckOutcome(margins, tuple(suspects), {**backward.missed, **missed})


def _roots(
    evidence: Evidence,
    step: int,
    backward: ComparedActivations,
    wrong: list[ComparedParameter],
) -> list[Suspect]:
    wrong_activations = {one.key for one in backward.wrong()}
    if not wrong and not wrong_activations:
        return []
    if compare_activations(evidence, step, "forward").wrong():
        return []  # a wrong forward pass makes every gradient wrong
    fed_wrongly = {key.module for key in wrong_activations if key.role == "output"}
    own = [one for one in wrong if one.module not in fed_wrongly]
    rest = [one.name for one in wrong if one.module in fed_wrongly]
    total = len(wrong) + len(wrong_activations)
    suspects = []
    called = {key.module for key in backward.compared}
    for root in first_divergences(list(backward.compared), wrong_activations.__contains__):
        details = {"first_of": total, "inputs_agree": True, "also": named_few(rest)}
        one = backward.compared[root]
        suspects.append(activation_suspect(evidence, step, one, _CHECK, details, module=scope_of(root, called)))
    for parameter in own:
        details = {"first_of": total, "inputs_agree": True}
        suspects.append(_parameter_suspect(evidence, step, parameter, details))
    return suspects


def _consequences(evidence: Evidence, step: int, wrong: list[ComparedParameter]) -> list[Suspect]:
    """Return one finding where gradients are wrong because something before them was."""
    if not wrong:
        return []
    first, *rest = wrong
    details = {"first_of": len(wrong), "inputs_agree": False, "also": named_few(one.name for one in rest)}
    return [_parameter_suspect(evidence, step, first, details)]


def _parameter_suspect(evidence: Evidence, step: int, one: ComparedParameter, details: dict[str, Any]) -> Suspect:
    missing = [tp_rank for tp_rank, part in enumerate(evidence.candidate[step]) if part.gradients.get(one.name) is None]
    if missing:
        details = {**details, "missing_on_ranks": evidence.ranks(tuple(missing))}
    where = {"phase": "backward", "step": step}
    return parameter_suspect(evidence, one, check=_CHECK, kind="gradient", where=where, details=details)
