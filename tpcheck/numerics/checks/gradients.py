"""Is every parameter's gradient the reference's, missing ones included?"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tpcheck.core.causes import Cause
from tpcheck.numerics.checks.activations import (
    ComparedActivations,
    compare_activations,
    first_divergences,
    is_inside,
    scope_of,
)
from tpcheck.numerics.checks.linear import ROUNDINGS, input_gradient_products, linear_hypotheses, own_weights
from tpcheck.numerics.checks.outputs import activation_suspect
from tpcheck.numerics.checks.parameters import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.numerics.checks.suspects import unlike_own
from tpcheck.numerics.differences import distance_of_terms, frobenius_distance, own_rounding
from tpcheck.numerics.evidence import CheckOutcome, Evidence, Hypothesis, Suspect, TensorKey


def gradient_hypotheses(evidence: Evidence, step: int, one: ComparedParameter) -> tuple[Hypothesis, ...]:
    """Return the mistakes of a parameter whose gradient is wrong."""
    if not one.expected_parts:
        return ()
    return (
        *_untied(evidence, step, one),
        *_averaged_wrongly(evidence, step, one),
        *_of_other_layers(evidence, step, one),
    )


def _untied(evidence: Evidence, step: int, one: ComparedParameter) -> Iterator[Hypothesis]:
    """Yield what a gradient is without that of a weight which is tied with it in the reference alone."""
    steps = evidence.candidate[step]
    for name in sorted(steps[0].gradients.keys() - evidence.reference[step].gradients.keys()):
        others = [part.gradients.get(name) for part in steps]
        pairs = list(zip(one.expected_parts, others, strict=True))
        if all(other is not None and other.shape == whole.shape for whole, other in pairs):
            yield Hypothesis(
                Cause.TIED_WEIGHT_UNTIED, tuple(whole - other for whole, other in pairs), {"tied_with": name}
            )


def _averaged_wrongly(evidence: Evidence, step: int, one: ComparedParameter) -> Iterator[Hypothesis]:
    """Yield what a gradient is without the mean over DP, and with another group in its place: TP, or all ranks."""
    own = evidence.reference[step].own_gradients.get(one.name)
    layout = evidence.layouts[one.name]
    alone = () if own is None else tuple(layout.local(own, tp_rank) for tp_rank in range(len(one.parts)))
    if _reduces_over_tp(evidence, step):
        yield from _over_tp(alone, "it is averaged over the TP group", mean=True)
        yield from _over_tp(one.expected_parts, "it is averaged over the TP group, too", mean=True)
        yield from _over_tp(one.expected_parts, "it is summed over the TP group", mean=False)
    if alone:
        yield Hypothesis(
            Cause.MISSING_REDUCE, alone, {"note": "it is that of its own replica's batch, not the mean over DP"}
        )


def _over_tp(parts: Sequence[torch.Tensor], note: str, *, mean: bool) -> Iterator[Hypothesis]:
    """Yield what all ranks hold once their parts, of one shape, are added up."""
    if len({part.shape for part in parts}) == 1:
        total = torch.stack([part.double() for part in parts]).sum(dim=0)
        yield Hypothesis(Cause.WRONG_GROUP, (total / len(parts) if mean else total,) * len(parts), {"note": note})


def _reduces_over_tp(evidence: Evidence, step: int) -> bool:
    """Return whether the ranks hold one gradient for different shards, of most parameters: one alone is no group's."""
    steps = evidence.candidate[step]
    equal = []
    for name, layout in evidence.layouts.items():
        first, *others = (one.gradients.get(name) for one in steps)
        if not layout.is_replicated and first is not None and bool(first.any()):
            equal.append(all(other is not None and torch.equal(other, first) for other in others))
    return len(steps) > 1 and sum(equal) > len(equal) / 2


def _of_other_layers(evidence: Evidence, step: int, one: ComparedParameter) -> Iterator[Hypothesis]:
    """Yield the gradients of all other parameters that lie over the ranks as this one does."""
    shapes = [part.shape for part in one.expected_parts]
    for name, gradient in evidence.reference[step].gradients.items():
        layout = evidence.layouts.get(name)
        if name == one.name or gradient is None or layout is None or tuple(gradient.shape) != tuple(layout.shape):
            continue
        parts = tuple(layout.local(gradient, tp_rank) for tp_rank in range(len(shapes)))
        if [part.shape for part in parts] == shapes:
            yield Hypothesis(Cause.TENSOR_OF_ANOTHER_LAYER, parts, {"it_is_of": name})


def own_gradient_suspects(
    evidence: Evidence,
    step: int,
    check: str,
    backward: ComparedActivations,
    wrong: Sequence[ComparedParameter],
    told: Collection[TensorKey | str],
) -> Iterator[Suspect]:
    """Yield column-parallel modules that send back, and weights that get, what their module's own tensors do not give.

    Args:
        wrong: Parameters whose gradient is wrong.
        told: Gradients of activations and names of parameters that are findings already.
    """
    for key in (one.key for one in backward.wrong() if one.key not in told):
        yield from _sent_back(evidence, step, check, backward, key)
    for one in wrong:
        if one.name not in told:
            yield from _of_weight(evidence, step, check, one)


def _sent_back(
    evidence: Evidence, step: int, check: str, backward: ComparedActivations, key: TensorKey
) -> Iterator[Suspect]:
    one = backward.compared[key]
    made = input_gradient_products(evidence, step, key, one.found.allowed)
    if made is None or not one.placed.is_replicated:
        return
    where = {"phase": "backward", "step": step, "module": key.module, "field": f"{key.role} {key.path}"}
    suspect = unlike_own(
        evidence,
        one.placed.parts,
        (made.total,) * len(one.placed.parts),
        one.found,
        check=check,
        kind="input_gradient",
        where=where,
        replicated=True,
    )
    if suspect is not None:
        told = linear_hypotheses(made, one.placed.parts, made.total, suspect.allowed_error)
        yield replace(suspect, hypotheses=tuple(told))


def _of_weight(evidence: Evidence, step: int, check: str, one: ComparedParameter) -> Iterator[Suspect]:
    own = _own_weight_gradients(evidence, step, one)
    if own is None:
        return
    suspect = unlike_own(
        evidence,
        one.parts,
        own,
        one.found,
        check=check,
        kind="gradient",
        where={"phase": "backward", "step": step, "module": one.module, "parameter": one.name},
        replicated=evidence.layouts[one.name].is_replicated,
    )
    if suspect is not None:
        yield replace(suspect, hypotheses=gradient_hypotheses(evidence, step, one))


def _own_weight_gradients(evidence: Evidence, step: int, one: ComparedParameter) -> tuple[torch.Tensor, ...] | None:
    """Return what each rank's input and output gradient give for its shard of a weight.

    None where the reference's do not give its gradient (the module is no linear one, or the weight is used elsewhere,
    too), and over DP, where no rank has the inputs of all.
    """
    before = TensorKey("forward", one.module, 0, "input", "0")
    after = TensorKey("backward", one.module, 0, "output", "0")
    whole = _product(evidence.reference[step].activations, before, after)
    if evidence.topology.dp > 1 or whole is None or whole.shape != one.expected.shape:
        return None
    if frobenius_distance(whole, one.expected.double()) > ROUNDINGS * one.found.allowed:
        return None
    held = own_weights(evidence, step, one.name)
    own = [_product(part.activations, before, after) for part in evidence.candidate[step]]
    made = tuple(part for part in own if part is not None)
    shapes = [] if held is None else [part.shape for part in held]
    return made if [part.shape for part in made] == shapes else None


def _product(activations: Any, before: TensorKey, after: TensorKey) -> torch.Tensor | None:
    given, sent = activations.get(before), activations.get(after)
    if given is None or sent is None or given.shape[:-1] != sent.shape[:-1] or given.dim() < 2:
        return None
    product: torch.Tensor = sent.double().flatten(0, -2).t() @ given.double().flatten(0, -2)
    return product


def gradients_alone(alone: Evidence) -> dict[str, ComparedParameter]:
    """Compare, of the modules run one by one, each gradient that every rank made as its shard lies.

    Nothing is reduced after such a pass: ranks may hold terms of the gradient of a replicated parameter. What adds up
    to the expected one is left out, for nobody can say whether it would have been reduced.
    """
    expected = dict(_made_everywhere(alone))
    compared, _ = compare_parameters(
        alone,
        expected,
        [one.gradients for one in alone.candidate[0]],
        lambda name, whole: alone.tolerance.allowed((0, alone.dp_rank, "gradient", name), own_rounding(whole)),
    )
    return {name: one for name, one in compared.items() if not _adds_up(alone, one)}


def _made_everywhere(alone: Evidence) -> Iterator[tuple[str, Any]]:
    for name, whole in alone.reference[0].gradients.items():
        layout = alone.layouts.get(name)
        made = [one.gradients.get(name) for one in alone.candidate[0]]
        shapes = [None if one is None else tuple(one.shape) for one in made]
        if whole is not None and layout is not None and shapes == list(layout.local_shapes):
            yield name, whole


def _adds_up(alone: Evidence, one: ComparedParameter) -> bool:
    if one.found.agrees or not alone.layouts[one.name].is_replicated:
        return False
    return distance_of_terms(one.parts, one.expected) <= one.found.allowed


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
    """Return the first wrong tensors, and those behind a mistake that linear modules tell of themselves."""
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
    hypotheses = (
        () if made is None else tuple(linear_hypotheses(made, one.placed.parts, one.expected, one.found.allowed))
    )
    suspect = activation_suspect(evidence, step, one, _CHECK, details, module=module, hypotheses=hypotheses)
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
    return replace(suspect, hypotheses=gradient_hypotheses(evidence, step, one))
