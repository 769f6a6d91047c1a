"""Is every parameter's gradient the reference's, missing ones included?"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tpcheck.numerics.checks.activations import (
    ComparedActivation,
    ComparedActivations,
    compare_activations,
    first_wrong_activations,
    nearest_compared,
    recorded_by_rank,
    scope_of,
)
from tpcheck.numerics.checks.backward_facts import backward_facts, collectives_passed, gradients_of_uses
from tpcheck.numerics.checks.outputs import activation_suspect
from tpcheck.numerics.checks.recompute import (
    NOTES,
    compare_with_recomputed,
    recompute_input_gradient,
    recompute_weight_gradient,
)
from tpcheck.numerics.checks.suspects import (
    ComparedParameter,
    compare_parameters,
    parameter_suspect,
    tensor_suspect,
)
from tpcheck.numerics.data_flow import consumers, feeding, in_phase, is_exchanged_behind, is_inside, is_result
from tpcheck.numerics.differences import (
    distance_of_terms,
    frobenius,
    frobenius_distance,
    rounding_error,
    subtract,
    summarize,
)
from tpcheck.numerics.evidence import (
    SKIPPED,
    BackwardFacts,
    CheckOutcome,
    Evidence,
    GradientFacts,
    LabelFacts,
    MarginsByModule,
    Suspect,
    TensorKey,
    worst_by_module,
)
from tpcheck.numerics.tolerance import RECOMPUTED_FACTOR

_CHECK = "gradients_match_reference"


def gradients_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare the gradients of all parameters and activations of `step`. Calibrated.

    Each gradient that is wrong although its module has the right inputs and output gradients is a finding of its own;
    those that are wrong in consequence are named in the first finding. Where precision is low, each module is also
    compared on the reference's inputs and output gradients (teacher forcing): those results go before those
    of the ordinary pass. What is done to a gradient after that, until the optimizer gets it, shows where it is not what
    the ranks' own inputs and output gradients give.
    """
    if evidence.reference[step].is_skipped:
        return CheckOutcome(not_compared={"gradients": SKIPPED})
    backward = compare_activations(evidence, step, "backward")
    parameters, not_compared = compare_parameters(
        evidence,
        evidence.reference[step].gradients,
        [rank.gradients for rank in evidence.candidate[step]],
        lambda name, expected: evidence.tolerance.allowed((step, "gradient", name), rounding_error(expected)),
    )
    suspects = _suspects(evidence, step, backward, parameters) or _consequences(evidence, step, parameters)
    not_compared = {**backward.not_compared, **not_compared}
    margins, by_module = _margins(backward, parameters), _by_module(backward, parameters)
    forced = None if any(suspect.gradient.missing_on for suspect in suspects) else evidence.of_forced_modules()
    # An output that is wrong makes gradients wrong, too; behind a wrong first step no other is compared.
    if forced is not None and step == 0 and compare_activations(forced, 0, "forward").wrong():
        forced = None
    if forced is not None and not suspects:
        of_own, suspects = _compare_with_own(evidence, forced, step, parameters)
        margins |= of_own
    outcome = CheckOutcome(margins, tuple(suspects), not_compared, by_module)
    if forced is None or step:
        return outcome
    backward, parameters = compare_activations(forced, 0, "backward"), _compare_forced_gradients(forced)
    return outcome.with_forced_modules(
        _margins(backward, parameters),
        _suspects(forced, 0, backward, parameters),
        _by_module(backward, parameters),
    )


def _margins(backward: ComparedActivations, parameters: Mapping[str, ComparedParameter]) -> dict[str, float]:
    return {**backward.margins(), **{name: parameter.difference.margin for name, parameter in parameters.items()}}


def _by_module(backward: ComparedActivations, parameters: Mapping[str, ComparedParameter]) -> MarginsByModule:
    of_parameters: list[MarginsByModule] = [
        {("backward", parameter.module): parameter.difference.margin} for parameter in parameters.values()
    ]
    return worst_by_module(backward.by_module(), *of_parameters)


def _wrong(parameters: Mapping[str, ComparedParameter]) -> list[ComparedParameter]:
    return [parameter for parameter in parameters.values() if not parameter.difference.agrees]


def _suspects(
    evidence: Evidence, step: int, backward: ComparedActivations, parameters: Mapping[str, ComparedParameter]
) -> list[Suspect]:
    """Return the first wrong tensors, and later ones that the tensors of their own linear module do not give."""
    wrong, wrong_activations = _wrong(parameters), {activation.key for activation in backward.wrong()}
    if not wrong and not wrong_activations:
        return []
    if compare_activations(evidence, step, "forward").wrong():  # which makes every gradient wrong
        return list(_unlike_recomputed(evidence, step, backward, wrong, known=()))
    roots = first_wrong_activations(evidence, step, backward)
    wrong_downstream = {key.module for key in wrong_activations if key.role == "output"}
    first_wrong, consequences = [], []
    for parameter in wrong:
        behind = _compared_behind(evidence, step, parameter, backward)
        if parameter.module in wrong_downstream or not wrong_activations.isdisjoint(behind):
            consequences.append(parameter.name)
        else:
            first_wrong.append(parameter)
    details: dict[str, Any] = {"first_of": len(wrong) + len(wrong_activations), "inputs_agree": True}
    missing = [parameter for parameter in first_wrong if _missing_on(evidence, step, parameter)]
    present = [parameter for parameter in first_wrong if not _missing_on(evidence, step, parameter)]
    if missing:
        roots = [root for root in roots if not _lacks_a_missing_one(evidence, step, root)]
    known: list[TensorKey | str] = [*roots, *(parameter.name for parameter in first_wrong)]
    of_roots = {**details, "also": consequences}
    suspects = [
        *([_missing_suspect(evidence, step, missing, details)] if missing else []),
        *(_activation_suspect(evidence, step, backward, root, of_roots) for root in roots),
        *(_parameter_suspect(evidence, step, parameter, details) for parameter in present),
    ]
    if len(first_wrong) == len(parameters) > 1:
        suspects = [replace(each, gradient=replace(each.gradient, is_every_parameter=True)) for each in suspects]
    return [*suspects, *_unlike_recomputed(evidence, step, backward, wrong, known)]


def _compared_behind(
    evidence: Evidence, step: int, parameter: ComparedParameter, backward: ComparedActivations
) -> Iterator[TensorKey]:
    """Yield the nearest gradients behind a parameter that were compared.

    Hand-written code takes weights without calling their module: what such a module returns is not recorded on the
    ranks, and what is computed from it stands for it.
    """
    uses = evidence.reference[step].uses.get(parameter.name, ())
    return nearest_compared(evidence, step, (in_phase(use, "backward") for use in uses), backward)


def _consequences(evidence: Evidence, step: int, parameters: Mapping[str, ComparedParameter]) -> list[Suspect]:
    """Return one suspect for all gradients that are wrong because activations are."""
    wrong = _wrong(parameters)
    if not wrong:
        return []
    first, *others = wrong
    details = {"first_of": len(wrong), "inputs_agree": False, "also": [parameter.name for parameter in others]}
    return [_parameter_suspect(evidence, step, first, details)]


def _activation_suspect(
    evidence: Evidence, step: int, backward: ComparedActivations, root: TensorKey, details: Mapping[str, Any]
) -> Suspect:
    module = scope_of(root, {key.module for key in backward.by_key})
    activation = backward.by_key[root]
    terms = recompute_input_gradient(evidence, step, root, activation.difference.allowed)
    if not is_result(root):
        details = {**details, "note": _what_is_wrong(evidence, step, root, backward)}
    facts, lost = backward_facts(evidence, step, root, activation.placed), _lost_term(evidence, step, root)
    if lost is not None:
        term, tp_ranks = lost
        ranks = evidence.ranks(tp_ranks)
        facts = replace(facts, lost_on=tuple(ranks))
        note = f"no gradient comes back to {term.place} on rank {', '.join(map(str, ranks))}"
        details = {**details, "note": note}
    suspect = activation_suspect(evidence, step, activation, _CHECK, details, module)
    return replace(suspect, kind="input_gradient", linear=terms, backward=facts)


def _lost_term(evidence: Evidence, step: int, root: TensorKey) -> tuple[TensorKey, tuple[int, ...]] | None:
    """Return a gradient that a wrong one is a sum with, and the ranks that have the tensor and no gradient of it.

    Only where some rank has it: what no rank records, as where hand-written code takes a weight without calling its
    module, is lost nowhere.
    """
    reference = evidence.reference[step].activations
    for forward in consumers(evidence, step, in_phase(root, "forward")):
        term = in_phase(forward, "backward")
        if term not in reference:
            continue
        has_gradient = [
            recorded_by_rank(rank.activations, term, reference) is not None for rank in evidence.candidate[step]
        ]
        lost = [
            tp_rank
            for tp_rank, rank in enumerate(evidence.candidate[step])
            if not has_gradient[tp_rank] and forward in rank.activations
        ]
        if lost and any(has_gradient):
            return term, tuple(lost)
    return None


def _what_is_wrong(evidence: Evidence, step: int, root: TensorKey, backward: ComparedActivations) -> str:
    """Return what is behind a wrong gradient that a module receives: the backward of what its output goes through."""
    before = feeding(evidence, step, root)
    compared = list(nearest_compared(evidence, step, before, backward))
    names = dict.fromkeys(each.module or "the loss" for each in compared)
    behind = f"between {root.module or 'the model'} and {', '.join(names)}" if names else f"behind {root.module}"
    agree = "the gradients before it agree" if names or not before else "no gradient before it was compared"
    return f"{agree}: wrong is the backward of what stands {behind}"


def _missing_suspect(
    evidence: Evidence, step: int, missing: Sequence[ComparedParameter], details: Mapping[str, Any]
) -> Suspect:
    """Return one suspect for all missing gradients, at the module where the backward pass ends."""
    end = _end_of_backward(evidence, step)
    if end is not None:
        end = _innermost_with_unseen_collectives(evidence, step, end)
    first, *others = sorted(missing, key=lambda each: end is not None and not is_inside(each.module, end.module))
    details = {**details, "also": [parameter.name for parameter in others]}
    suspect = _parameter_suspect(evidence, step, first, details)
    missing_on = tuple(evidence.ranks(_missing_on(evidence, step, first)))
    suspect = replace(suspect, gradient=replace(suspect.gradient, missing_on=missing_on))
    if end is None:
        return suspect
    suspect = replace(suspect, backward=BackwardFacts(unseen=collectives_passed(evidence, step, end, unseen=True)))
    where = {key: value for key, value in suspect.where.items() if key != "parameter" or len(missing) == 1}
    note = f"no gradient comes back to the {end.role} of {end.module or 'the model'}"
    return replace(suspect, where={**where, "module": end.module}, evidence={**suspect.evidence, "note": note})


def _end_of_backward(evidence: Evidence, step: int) -> TensorKey | None:
    """Return the first tensor whose gradient the reference has and some rank does not."""
    return next(
        (
            key
            for key in evidence.reference[step].activations
            if key.phase == "backward" and _lacks(evidence, step, key)
        ),
        None,
    )


def _lacks(evidence: Evidence, step: int, gradient: TensorKey) -> bool:
    """Return whether some rank has not recorded a gradient of an activation."""
    reference = evidence.reference[step].activations
    return any(recorded_by_rank(rank.activations, gradient, reference) is None for rank in evidence.candidate[step])


def _lacks_a_missing_one(evidence: Evidence, step: int, root: TensorKey) -> bool:
    """Return whether a gradient is a sum with a term that does not come back at all, which is a finding already."""
    terms = (in_phase(after, "backward") for after in consumers(evidence, step, in_phase(root, "forward")))
    return any(_lacks(evidence, step, term) for term in terms if term in evidence.reference[step].activations)


def _innermost_with_unseen_collectives(evidence: Evidence, step: int, end: TensorKey) -> TensorKey:
    """Return the output of the module inside of which a collective ends the backward pass; `end` where none does."""
    sources, output = evidence.reference[step].sources, end
    while not collectives_passed(evidence, step, output, unseen=True):
        inside = (
            before
            for before in sources.get(in_phase(output, "forward"), ())
            if before.role == "output" and is_inside(before.module, output.module)
        )
        before = next(inside, None)
        if before is None:
            return end
        output = in_phase(before, "backward")
    return output


def _missing_on(evidence: Evidence, step: int, parameter: ComparedParameter) -> tuple[int, ...]:
    """Return the tp_ranks that have no gradient of a parameter, or nothing but zeros where there should be more."""
    gradients = [rank.gradients.get(parameter.name) for rank in evidence.candidate[step]]
    expected = parameter.expected_parts or (parameter.expected,) * len(gradients)
    pairs = enumerate(zip(gradients, expected, strict=True))
    return tuple(rank for rank, (part, full) in pairs if part is None or (not part.any() and bool(full.any())))


def _parameter_suspect(
    evidence: Evidence, step: int, parameter: ComparedParameter, details: Mapping[str, Any]
) -> Suspect:
    where = {"phase": "backward", "step": step}
    suspect = parameter_suspect(evidence, parameter, check=_CHECK, kind="gradient", where=where, details=details)
    return _with_facts(evidence, step, parameter, suspect)


def _with_facts(evidence: Evidence, step: int, parameter: ComparedParameter, suspect: Suspect) -> Suspect:
    """Add the gradients that may stand in the place of a wrong one, or be a part of it."""
    if not parameter.expected_parts:
        return suspect
    reference, candidate = evidence.reference[step], evidence.candidate[step]
    local, layout = reference.local_gradients.get(parameter.name), evidence.layouts[parameter.name]
    otherwise = reference.otherwise_normalised.get(parameter.name)
    facts = GradientFacts(
        local_parts=() if local is None else layout.parts(local),
        is_reduced_over_tp=_is_reduced_over_tp(evidence, step),
        micro_mean=_parts_by_micro_batch(layout, [each.mean.get(parameter.name) for each in reference.micro_gradients]),
        micro_local=_parts_by_micro_batch(
            layout, [each.local.get(parameter.name) for each in reference.micro_gradients]
        ),
        otherwise_normalised=() if otherwise is None else layout.parts(otherwise),
        untied={
            name: tuple(rank.gradients.get(name) for rank in candidate)
            for name in sorted(candidate[0].gradients.keys() - reference.gradients.keys())
        },
        uses=gradients_of_uses(evidence, step, parameter),
    )
    others = {
        name: (gradient, *other.parts(gradient))
        for name, gradient in reference.gradients.items()
        if name != parameter.name
        and gradient is not None
        and (other := evidence.layouts.get(name)) is not None
        and (other.shape, other.local_shapes) == (tuple(gradient.shape), layout.local_shapes)
    }
    labels = LabelFacts(evidence.labels[step], evidence.dp_rank, 0) if evidence.labels else None
    return replace(suspect, gradient=facts, others=others, labels=labels)


def _parts_by_micro_batch(
    layout: Any, gradients: Sequence[torch.Tensor | None]
) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Return each rank's part of what each micro-batch adds; nothing where one of them adds none."""
    present = [gradient for gradient in gradients if gradient is not None]
    return tuple(layout.parts(gradient) for gradient in present) if len(present) == len(gradients) else ()


def _is_reduced_over_tp(evidence: Evidence, step: int) -> bool:
    """Return whether the ranks hold one gradient for different shards, of most parameters: one alone is no proof."""
    steps = evidence.candidate[step]
    equal = []
    for name, layout in evidence.layouts.items():
        first, *others = (rank.gradients.get(name) for rank in steps)
        if not layout.is_replicated and first is not None and bool(first.any()):
            equal.append(all(other is not None and torch.equal(other, first) for other in others))
    return len(steps) > 1 and sum(equal) > len(equal) / 2


def _unlike_recomputed(
    evidence: Evidence,
    step: int,
    backward: ComparedActivations,
    wrong: Sequence[ComparedParameter],
    known: Collection[TensorKey | str],
) -> Iterator[Suspect]:
    """Yield the gradients of linear modules that the ranks' own activations and weights do not give.

    Args:
        wrong: Parameters whose gradient is wrong.
        known: Gradients of activations, and names of parameters, that are suspects already.
    """
    for activation in backward.wrong():
        if activation.key not in known:
            yield from _input_gradient_suspect(evidence, step, activation)
    for parameter in wrong:
        if parameter.name not in known:
            yield from _weight_gradient_suspect(evidence, step, parameter)


def _input_gradient_suspect(evidence: Evidence, step: int, activation: ComparedActivation) -> Iterator[Suspect]:
    key, placed = activation.key, activation.placed
    terms = recompute_input_gradient(evidence, step, key, activation.difference.allowed)
    if terms is None or not placed.is_replicated:
        return
    suspect = compare_with_recomputed(
        evidence,
        placed.parts,
        (terms.total,) * len(placed.parts),
        activation.difference,
        check=_CHECK,
        kind="input_gradient",
        where={"phase": "backward", "step": step, "module": key.module, "field": f"{key.role} {key.path}"},
        is_replicated=True,
        terms=terms.by_rank,
        are_summed_later=partial(is_exchanged_behind, evidence, step, key),
    )
    if suspect is not None:
        yield replace(suspect, role=key.role, linear=terms)


def _weight_gradient_suspect(evidence: Evidence, step: int, parameter: ComparedParameter) -> Iterator[Suspect]:
    recomputed = recompute_weight_gradient(evidence, step, parameter)
    if recomputed is None or _is_reduced(evidence, parameter, recomputed):
        return
    suspect = compare_with_recomputed(
        evidence,
        parameter.actual_parts,
        recomputed,
        parameter.difference,
        check=_CHECK,
        kind="gradient",
        where={"phase": "backward", "step": step, "module": parameter.module, "parameter": parameter.name},
        is_replicated=evidence.layouts[parameter.name].is_replicated,
    )
    if suspect is not None:
        yield _with_facts(evidence, step, parameter, suspect)


def _compare_with_own(
    evidence: Evidence, forced: Evidence, step: int, parameters: Mapping[str, ComparedParameter]
) -> tuple[dict[str, float], list[Suspect]]:
    """Compare the gradients of linear modules with those that the ranks' own inputs and output gradients give.

    Only the rounding of one module is between the two, whatever that of the modules before adds up to: as much is
    allowed as under teacher forcing.
    """
    margins: dict[str, float] = {}
    suspects = []
    for parameter in parameters.values():
        allowed = _allowed_of_one_module(forced, parameter)
        recomputed = recompute_weight_gradient(evidence, step, parameter, allowed)
        if recomputed is None:
            continue
        size, is_replicated = parameter.difference.expected_norm, evidence.layouts[parameter.name].is_replicated
        if is_replicated and any(frobenius_distance(each, recomputed[0]) > allowed for each in recomputed):
            size = sum(map(frobenius, recomputed))  # terms, each of which is rounded
            recomputed = (torch.stack(recomputed).sum(dim=0),) * len(recomputed)
        allowed *= max(1.0, size / (parameter.difference.expected_norm or 1.0))
        gaps = [subtract(part, own) for part, own in zip(parameter.actual_parts, recomputed, strict=True)]
        difference = summarize(gaps, parameter.difference.expected_norm, allowed, is_replicated=is_replicated)
        margins[f"{parameter.name}, of its own inputs"] = difference.margin
        if not difference.agrees:
            suspect = tensor_suspect(
                evidence,
                difference,
                check=_CHECK,
                kind="gradient",
                where={"phase": "backward", "step": step, "module": parameter.module, "parameter": parameter.name},
                expected=recomputed[0] if is_replicated else None,
                actual_parts=parameter.actual_parts,
                expected_parts=recomputed,
                is_replicated=is_replicated,
                details={"inputs_agree": True, "note": NOTES["gradient"]},
            )
            suspects.append(suspect)
    return margins, suspects


def _allowed_of_one_module(forced: Evidence, parameter: ComparedParameter) -> float:
    """Return the error of a gradient that the rounding of its module alone may make."""
    expected = forced.reference[0].gradients.get(parameter.name)
    if expected is None or not bool(expected.any()):
        return 0.0
    allowed = forced.tolerance.allowed((0, forced.dp_rank, "gradient", parameter.name), rounding_error(expected))
    return allowed / frobenius(expected) * parameter.difference.expected_norm


def _is_reduced(evidence: Evidence, parameter: ComparedParameter, recomputed: Sequence[torch.Tensor]) -> bool:
    """Return whether the ranks' own gradients of a whole weight differ, and every rank has the sum or the mean of them.

    They are terms, or differ because of an earlier mistake: gradients of whole weights may be averaged over all ranks.
    Behind such a mistake, terms that are averaged in place of summed are not seen.
    """
    allowed, first = RECOMPUTED_FACTOR * parameter.difference.allowed, recomputed[0]
    if not evidence.layouts[parameter.name].is_replicated:
        return False
    if all(frobenius_distance(each, first) <= allowed for each in recomputed):
        return False
    total = torch.stack(tuple(recomputed)).sum(dim=0)
    allowed *= max(1.0, frobenius(total) / (parameter.difference.expected_norm or 1.0))
    return any(
        all(frobenius_distance(part, total / divisor) <= allowed for part in parameter.actual_parts)
        for divisor in (1, len(recomputed))
    )


def _compare_forced_gradients(forced: Evidence) -> dict[str, ComparedParameter]:
    """Compare, under teacher forcing, each gradient that every rank computed for its shard.

    Nothing is reduced after such a pass: ranks may hold terms of the gradient of a replicated parameter. Terms that add
    up to the expected gradient are left out, because whether they would have been reduced is unknown.
    """
    expected = {}
    for name, gradient in forced.reference[0].gradients.items():
        layout = forced.layouts.get(name)
        parts = [rank.gradients.get(name) for rank in forced.candidate[0]]
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        if gradient is not None and layout is not None and shapes == list(layout.local_shapes):
            expected[name] = gradient
    compared, _ = compare_parameters(
        forced,
        expected,
        [rank.gradients for rank in forced.candidate[0]],
        lambda name, expected: forced.tolerance.allowed(
            (0, forced.dp_rank, "gradient", name), rounding_error(expected)
        ),
    )
    for name, parameter in list(compared.items()):
        difference = parameter.difference
        may_be_terms = forced.layouts[name].is_replicated and not difference.agrees
        if may_be_terms and distance_of_terms(parameter.actual_parts, parameter.expected) <= difference.allowed:
            del compared[name]
    return compared
