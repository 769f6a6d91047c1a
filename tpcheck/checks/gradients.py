"""Is every parameter's gradient the reference's, missing ones included?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tpcheck.checks.activations import ComparedActivations, compare_activations
from tpcheck.checks.gradients_alone import gradients_alone
from tpcheck.checks.linear import input_gradient_products
from tpcheck.checks.localise import first_divergences, is_inside, scope_of
from tpcheck.checks.mistaken_gradients import mistaken_gradients
from tpcheck.checks.mistakes import mistakes
from tpcheck.checks.outcome import CheckOutcome
from tpcheck.checks.outputs import activation_suspect
from tpcheck.checks.own_gradients import own_gradient_suspects
from tpcheck.checks.parameters import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.compare import own_rounding
from tpcheck.records import Evidence, Suspect, TensorKey

_CHECK = "gradients_match_reference"


def gradients_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare the gradients of all parameters and activations of `step`. Calibrated.

    Each gradient that is wrong although its module was given the right inputs and output gradients is a finding of
    its own; those that are wrong in consequence are named in the first finding. Where precision is low, each module is
    held against the reference on the reference's own inputs and output gradients, too: what that shows goes before what
    a whole pass shows.
    """
    backward = compare_activations(evidence, step, "backward")
    parameters, missed = compare_parameters(
        evidence,
        evidence.reference[step].gradients,
        [part.gradients for part in evidence.candidate[step]],
        lambda name, whole: evidence.tolerance.allowed((step, "gradient", name), own_rounding(whole)),
    )
    wrong = _wrong(parameters)
    suspects = _suspects(evidence, step, backward, parameters) or _consequences(evidence, step, wrong)
    outcome = CheckOutcome(_margins(backward, parameters), tuple(suspects), {**backward.missed, **missed})
    alone = None if step else evidence.alone()
    return outcome if alone is None else _sharpened(outcome, alone)


def _sharpened(outcome: CheckOutcome, alone: Evidence) -> CheckOutcome:
    """Return the outcome with what the modules show one by one, unless one is wrong forward already."""
    if compare_activations(alone, 0, "forward").wrong():
        return outcome
    backward = compare_activations(alone, 0, "backward")
    parameters = gradients_alone(alone)
    suspects = _suspects(alone, 0, backward, parameters)
    return outcome.sharpened(_margins(backward, parameters), suspects)


def _suspects(
    evidence: Evidence, step: int, backward: ComparedActivations, parameters: Mapping[str, ComparedParameter]
) -> list[Suspect]:
    """Return the first mistakes, and those behind a mistake that linear modules tell of themselves."""
    wrong, wrong_activations = _wrong(parameters), {one.key for one in backward.wrong()}
    if not wrong and not wrong_activations:
        return []
    if compare_activations(evidence, step, "forward").wrong():  # which makes every gradient wrong
        return list(own_gradient_suspects(evidence, step, _CHECK, backward, wrong, told=()))
    roots = first_divergences(list(backward.compared), wrong_activations.__contains__)
    fed_wrongly = {key.module for key in wrong_activations if key.role == "output"}
    own = [one for one in wrong if one.module not in fed_wrongly]
    rest = [one.name for one in wrong if one.module in fed_wrongly]
    details: dict[str, Any] = {"first_of": len(wrong) + len(wrong_activations), "inputs_agree": True}
    if len(own) == len(parameters) > 1:
        details["every_parameter"] = True
    told: list[TensorKey | str] = [*roots, *(one.name for one in own)]
    return [
        *_roots(evidence, step, backward, roots, own, details, rest),
        *own_gradient_suspects(evidence, step, _CHECK, backward, wrong, told),
    ]


def _wrong(parameters: Mapping[str, ComparedParameter]) -> list[ComparedParameter]:
    return [one for one in parameters.values() if not one.found.agrees]


def _margins(backward: ComparedActivations, parameters: Mapping[str, ComparedParameter]) -> dict[str, float]:
    return {**backward.margins(), **{name: one.found.margin for name, one in parameters.items()}}


def _roots(
    evidence: Evidence,
    step: int,
    backward: ComparedActivations,
    roots: Sequence[TensorKey],
    own: Sequence[ComparedParameter],
    details: Mapping[str, Any],
    rest: Sequence[str],
) -> list[Suspect]:
    """Return a suspect for each of `roots` and of the parameters in `own`, one for all that have no gradient."""
    missing = [one for one in own if _missing_on(evidence, step, one)]
    present = [one for one in own if not _missing_on(evidence, step, one)]
    of_roots = {**details, "also": list(rest)}
    return [
        *([_missing_suspect(evidence, step, missing, details)] if missing else []),
        *(_activation_suspect(evidence, step, backward, root, of_roots) for root in roots),
        *(_parameter_suspect(evidence, step, one, details) for one in present),
    ]


def _activation_suspect(
    evidence: Evidence, step: int, backward: ComparedActivations, root: TensorKey, details: Mapping[str, Any]
) -> Suspect:
    module = scope_of(root, {key.module for key in backward.compared})
    one = backward.compared[root]
    made = input_gradient_products(evidence, step, root, one.found.allowed)
    mistaken = () if made is None else tuple(mistakes(made, one.placed.parts, one.expected, one.found.allowed))
    suspect = activation_suspect(evidence, step, one, _CHECK, details, module=module, mistaken=mistaken)
    return replace(suspect, kind="input_gradient")


def _consequences(evidence: Evidence, step: int, wrong: list[ComparedParameter]) -> list[Suspect]:
    """Return one finding where gradients are wrong because something before them was."""
    if not wrong:
        return []
    first, *rest = wrong
    details = {"first_of": len(wrong), "inputs_agree": False, "also": [one.name for one in rest]}
    return [_parameter_suspect(evidence, step, first, details)]


def _missing_suspect(
    evidence: Evidence, step: int, missing: list[ComparedParameter], details: Mapping[str, Any]
) -> Suspect:
    """Return one finding for all gradients that were never made, at the module where the backward pass ends."""
    end = _end_of_backward(evidence, step)
    first, *rest = sorted(missing, key=lambda one: end is not None and not is_inside(one.module, end.module))
    details = {**details, "missing_on_ranks": evidence.ranks(_missing_on(evidence, step, first))}
    suspect = _parameter_suspect(evidence, step, first, {**details, "also": [one.name for one in rest]})
    if end is None:
        return suspect
    where = {key: value for key, value in suspect.where.items() if key != "parameter" or len(missing) == 1}
    note = f"no gradient comes back to the {end.role} of {end.module or 'the model'}"
    return replace(suspect, where={**where, "module": end.module}, evidence={**suspect.evidence, "note": note})


def _end_of_backward(evidence: Evidence, step: int) -> TensorKey | None:
    """Return the first tensor whose gradient the reference has and some rank does not."""
    seen = [part.activations for part in evidence.candidate[step]]
    return next(
        (
            key
            for key in evidence.reference[step].activations
            if key.phase == "backward" and any(key not in activations for activations in seen)
        ),
        None,
    )


def _missing_on(evidence: Evidence, step: int, one: ComparedParameter) -> tuple[int, ...]:
    """Return the tp_ranks that have no gradient of a parameter, or nothing but zeros where there should be more."""
    held = [part.gradients.get(one.name) for part in evidence.candidate[step]]
    expected = one.expected_parts or (one.expected,) * len(held)
    pairs = enumerate(zip(held, expected, strict=True))
    return tuple(rank for rank, (own, whole) in pairs if own is None or (not own.any() and bool(whole.any())))


def _parameter_suspect(evidence: Evidence, step: int, one: ComparedParameter, details: Mapping[str, Any]) -> Suspect:
    where = {"phase": "backward", "step": step}
    suspect = parameter_suspect(evidence, one, check=_CHECK, kind="gradient", where=where, details=details)
    return replace(suspect, mistaken=mistaken_gradients(evidence, step, one))
