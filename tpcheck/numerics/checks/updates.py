"""Are the weights and buffers after an optimizer step the reference's, and the norm that clipping uses?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import Any

import torch

from tpcheck.core.placement import Replicate
from tpcheck.numerics.activation_placement import PlacedTensor
from tpcheck.numerics.checks.clipping import (
    TERMS,
    clipped_step,
    implied_norms,
    norm_facts,
    shares_of,
    shares_of_terms,
    terms_of_step,
)
from tpcheck.numerics.checks.replicas import replicas_differ
from tpcheck.numerics.checks.suspects import (
    DECAYED_OR_NOT,
    ComparedParameter,
    compare_logged,
    compare_parameters,
    compare_scalar,
    may_be_decayed_or_not,
    parameter_suspect,
    tensor_suspect,
)
from tpcheck.numerics.differences import (
    Difference,
    compare_placed,
    frobenius,
    frobenius_distance,
    rounding_error,
    spacing,
    subtract,
    summarize,
)
from tpcheck.numerics.evidence import (
    EVALUATION_LOSS,
    LOGGED_NORM,
    LOGGED_RATE,
    SKIPPED,
    CheckOutcome,
    Evidence,
    NormFacts,
    ReplicaFacts,
    StepFacts,
    Suspect,
)
from tpcheck.numerics.norms import ClippedStep, explain_norm
from tpcheck.numerics.tolerance import LEAST_ELEMENTS, RESIDUAL_EXACT, STEP_IN_SPACINGS

_NORM_CHECK = "gradient_norm_matches_reference"


def gradient_norm_matches_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare each rank's gradient norm of `step`. Calibrated."""
    expected = evidence.reference[step].gradient_norm
    actual = [part.gradient_norm for part in evidence.candidate[step]]
    name = "gradient norm"
    logged = compare_logged(evidence, step, {LOGGED_NORM: "logged norm"}, check=_NORM_CHECK, phase="update")
    if evidence.reference[step].is_skipped:
        return CheckOutcome(not_compared={name: SKIPPED})
    if expected is None or any(norm is None for norm in actual):
        why = {name: "the backend does not report the norm that it clips by"}
        return CheckOutcome(not_compared=why).or_else(logged)
    allowed = evidence.tolerance.allowed_scalar((step, "norm"), expected)
    where = {"phase": "update", "step": step}
    norms = [norm for norm in actual if norm is not None]
    margin, suspect = compare_scalar(
        evidence, "norm", norms, expected, allowed, check=_NORM_CHECK, kind="norm", where=where
    )
    if suspect is None:
        return CheckOutcome({name: margin}).or_else(logged)
    if skipped := _skipped_on(evidence, step):
        suspect = replace(suspect, step=StepFacts(skipped_on=skipped))
        return CheckOutcome({name: margin}, (suspect,))
    facts = norm_facts(evidence, step, clipped_step(evidence, step, _shares_of_all(evidence, step)))
    if facts is not None:
        suspect = replace(suspect, norms=facts, evidence={**suspect.evidence, **_norm_evidence(facts)})
    return CheckOutcome({name: margin}, (suspect,))


def _shares_of_all(evidence: Evidence, step: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """Return the shares of the terms in the step of every parameter; nothing where no step was taken."""
    names = [name for name in evidence.reference[step].weights if name in evidence.layouts]
    return {name: shares_of_terms(evidence, step, name) for name in names}


def _norm_evidence(facts: NormFacts) -> dict[str, Any]:
    """Return what a wrong norm could be, where several mistakes give it, and by what the step was clipped instead."""
    could_be = explain_norm(facts.of_reported, facts.norms).could_be
    evidence: dict[str, Any] = {"norm_could_be": list(could_be)} if could_be else {}
    if facts.step is not None and facts.clips_otherwise_than_reported:
        if facts.step.is_right:
            evidence["clipped_by"] = "the right norm: only what is reported is wrong"
        elif _is_clipped_by(facts.step, facts.reported):
            evidence["clipped_by"] = "the norm that is reported"
        elif facts.step.factors:
            evidence["clipped_by"] = "another norm than the right one and the one that is reported"
    return evidence


def _is_clipped_by(step: ClippedStep, norms: Sequence[float]) -> bool:
    expected = [step.clipping.factor(norm) for norm in norms]
    return bool(step.factors) and all(
        abs(actual - factor) <= RESIDUAL_EXACT * factor
        for of_ranks in step.factors.values()
        for actual, factor in zip(of_ranks, expected, strict=True)
    )


_CHECK = "updates_match_reference"
_HIDDEN = "its step is smaller than the error that rounding allows: one left out would not show"


def updates_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare every parameter and buffer after `step`. Calibrated.

    Where the optimizer has float32 masters, each rank's weight must be its own master, rounded, to the bit: in a lower
    dtype much less is seen by the other comparison. A recorded call of the model that no optimizer step followed has no
    weights to compare.
    """
    compared, not_compared = compare_parameters(
        evidence,
        evidence.reference[step].weights,
        [rank.weights for rank in evidence.candidate[step]],
        lambda name, expected: evidence.tolerance.allowed((step, "weight", name), spacing(expected)),
    )
    differing = [name for name, parameter in compared.items() if not parameter.difference.agrees]
    is_skipped = evidence.reference[step].is_skipped
    for name in [name for name in differing if may_be_decayed_or_not(evidence, step, name)]:
        del compared[name]
        not_compared[name] = DECAYED_OR_NOT
    masters = {name: _rounded_masters(evidence, step, each) for name, each in compared.items()}
    unmoved: list[Suspect] = []
    for name, each in list(compared.items()):
        if not masters[name] and _hides_its_step(evidence, step, each):
            gaps = _stays_where_it_should_move(evidence, step, each)
            if gaps is None:
                del compared[name]
                not_compared[name] = _HIDDEN
            unmoved.extend(_unmoved(evidence, step, each, gaps or ()))
    wrong = [parameter for parameter in compared.values() if not parameter.difference.agrees]
    wrong.sort(key=lambda parameter: -parameter.difference.margin)
    suspects = [*(_weight_suspects(evidence, step, wrong, masters) if wrong else []), *unmoved]
    buffers, buffers_not_compared = _compare_buffers(evidence, step)
    suspects.extend(_buffer_suspect(evidence, step, buffer) for buffer in buffers if not buffer.difference.agrees)
    margins = {name: parameter.difference.margin for name, parameter in compared.items()}
    margins |= dict.fromkeys((str(suspect.parameter) for suspect in unmoved), inf)
    for parameter in compared.values():
        if rounded := masters[parameter.name]:
            is_unlike = bool(_unlike_masters(parameter, rounded))
            margins[f"{parameter.name}, of its master"] = inf if is_unlike else 0.0
            if is_unlike and parameter not in wrong:
                suspects.append(_unlike_master(evidence, step, parameter, rounded))
    if not wrong and _nothing_moved(evidence, step):
        why = SKIPPED if is_skipped else "no weight moves in this step: its rate is 0, or rounding takes the step away"
        margins = {}
        not_compared |= dict.fromkeys(["weights"] if is_skipped else compared, why)
    has_weights = bool(margins)
    margins |= {f"buffer {buffer.name}": buffer.difference.margin for buffer in buffers}
    if not evidence.reference[step].weights:
        not_compared["weights"] = "no optimizer step followed this call"
    outcome = CheckOutcome(margins, tuple(suspects), {**not_compared, **buffers_not_compared})
    rate = compare_logged(evidence, step, {LOGGED_RATE: "logged learning rate"}, check=_CHECK, phase="update")
    evaluation = compare_logged(
        evidence, step, {EVALUATION_LOSS: "loss of the evaluation"}, check=_CHECK, phase="evaluation"
    )
    # A rate that is wrong in the log alone leaves the weights right; either makes the evaluation wrong.
    joined = rate.beside(outcome).or_else(evaluation)
    return joined if has_weights else replace(joined, compared_only=_beside_weights(buffers, rate, evaluation))


def _beside_weights(buffers: Sequence[ComparedParameter], *logged: CheckOutcome) -> str:
    """Return what was compared where no weight was."""
    is_logged = any(outcome.margins for outcome in logged)
    return " and ".join([*(["buffers"] if buffers else []), *(["what is logged"] if is_logged else [])])


def _rounded_masters(evidence: Evidence, step: int, parameter: ComparedParameter) -> tuple[torch.Tensor, ...]:
    """Return each rank's master in the dtype of its weight; nothing where a rank has none, of a wider dtype."""
    masters = [rank.optimizer_state.get(("master", parameter.name)) for rank in evidence.candidate[step]]
    pairs = [(master, part) for master, part in zip(masters, parameter.actual_parts, strict=True) if master is not None]
    if len(pairs) < len(masters) or any(master.shape != part.shape for master, part in pairs):
        return ()
    if any(master.dtype.itemsize <= part.dtype.itemsize for master, part in pairs):
        return ()
    return tuple(master.to(part.dtype) for master, part in pairs)


def _unlike_masters(parameter: ComparedParameter, masters: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return the TP ranks whose weight is not its master, rounded; none where there are no masters."""
    pairs = enumerate(zip(parameter.actual_parts, masters, strict=False))
    return tuple(tp_rank for tp_rank, (part, master) in pairs if bool((subtract(part, master) != 0).any()))


def _unlike_master(
    evidence: Evidence, step: int, parameter: ComparedParameter, masters: tuple[torch.Tensor, ...]
) -> Suspect:
    gaps = [subtract(part, master) for part, master in zip(parameter.actual_parts, masters, strict=True)]
    difference = summarize(gaps, frobenius(torch.cat([each.reshape(-1) for each in masters])), 0.0, is_replicated=False)
    note = "compared with the float32 masters, rounded"
    suspect = _suspect_to_the_bit(evidence, step, parameter, difference, masters, note, is_replicated=False)
    return replace(suspect, step=StepFacts(unlike_masters_on=tuple(suspect.where["ranks"])))


def _nothing_moved(evidence: Evidence, step: int) -> bool:
    """Return whether the step leaves all of the reference's weights as they were: a wrong step would not show."""
    before = evidence.reference[step - 1].weights if step else evidence.initial
    after = evidence.reference[step].weights
    return bool(after) and all(name in before and torch.equal(before[name], after[name]) for name in after)


def _hides_its_step(evidence: Evidence, step: int, parameter: ComparedParameter) -> bool:
    """Return whether a right weight would be right without its step, too, as in bfloat16 without float32 masters."""
    before = evidence.weights_before(step).get(parameter.name)
    if before is None or not parameter.difference.agrees:
        return False
    return 0 < frobenius_distance(parameter.expected, before) <= parameter.difference.allowed


def _stays_where_it_should_move(
    evidence: Evidence, step: int, parameter: ComparedParameter
) -> tuple[torch.Tensor, ...] | None:
    """Return each rank's distance to the expected weight at the elements that should have moved, and did not.

    Those are elements that the reference moves by some spacings of their dtype, more than rounding takes away, on a
    rank that has a gradient of them and whose part is to the bit what it was before the step; zeros elsewhere. None
    where a part has too few such elements: then a step that is left out does not show. Without a gradient of its own
    a rank may rightly leave them: rounding sends a token to another expert, or is all that the reference's gradient is.
    """
    layout, before = evidence.layouts[parameter.name], evidence.weights_before(step)[parameter.name]
    if not parameter.expected_parts or tuple(before.shape) != tuple(layout.shape):
        return None
    gaps = []
    ranks = zip(
        evidence.candidate[step],
        evidence.parts_before(step),
        layout.parts(before),
        parameter.expected_parts,
        parameter.actual_parts,
        strict=True,
    )
    for rank, actual_before, expected_before, expected, actual in ranks:
        gradient = rank.gradients.get(parameter.name)
        if gradient is None or gradient.shape != actual.shape:
            return None
        spacings = torch.finfo(expected.dtype).eps * expected_before.double().abs()
        moves = subtract(expected, expected_before).abs() >= STEP_IN_SPACINGS * spacings
        moves &= (expected != expected_before) & (gradient != 0)
        if int(moves.sum()) < LEAST_ELEMENTS:
            return None
        is_still = torch.equal(actual_before[parameter.name], actual)
        gaps.append(subtract(actual, expected) * (moves & is_still))
    return tuple(gaps)


def _suspect_to_the_bit(
    evidence: Evidence,
    step: int,
    parameter: ComparedParameter,
    difference: Difference,
    expected_parts: tuple[torch.Tensor, ...],
    note: str,
    *,
    is_replicated: bool,
) -> Suspect:
    """Return a weight that is wrong beside parts that it should equal to the bit."""
    return tensor_suspect(
        evidence,
        difference,
        check=_CHECK,
        kind="update",
        where={"phase": "update", "step": step, "module": parameter.module, "parameter": parameter.name},
        expected=parameter.expected,
        actual_parts=parameter.actual_parts,
        expected_parts=expected_parts,
        is_replicated=is_replicated,
        details={"note": note},
    )


def _unmoved(
    evidence: Evidence, step: int, parameter: ComparedParameter, gaps: tuple[torch.Tensor, ...]
) -> Iterator[Suspect]:
    """Yield a suspect for a weight that the step leaves as it was on some ranks, where the reference's moves."""
    if not any(bool(gap.any()) for gap in gaps):
        return
    expected_parts = tuple(
        expected if bool(gap.any()) else actual
        for gap, expected, actual in zip(gaps, parameter.expected_parts, parameter.actual_parts, strict=True)
    )
    is_replicated = evidence.layouts[parameter.name].is_replicated
    difference = summarize(gaps, frobenius(parameter.expected), 0.0, is_replicated=is_replicated)
    note = "it is to the bit what it was before the step, which moves the expected weight"
    suspect = _suspect_to_the_bit(
        evidence, step, parameter, difference, expected_parts, note, is_replicated=is_replicated
    )
    before = tuple(part[parameter.name] for part in evidence.parts_before(step))
    yield replace(suspect, step=StepFacts(before=before, skipped_on=_skipped_on(evidence, step)))


def _compare_buffers(evidence: Evidence, step: int) -> tuple[list[ComparedParameter], dict[str, str]]:
    """Return the comparisons, and why the other buffers could not be compared, by label. Calibrated."""
    compared = []
    not_compared = {}
    tp = len(evidence.candidate[step])
    for name, expected in evidence.reference[step].buffers.items():
        parts = tuple(rank.buffers[name] for rank in evidence.candidate[step] if name in rank.buffers)
        if len(parts) < tp:
            not_compared[f"buffer {name}"] = "the sharded model has no buffer of this name"
        elif any(part.shape != expected.shape for part in parts):
            not_compared[f"buffer {name}"] = "the sharded model's buffer has another shape"
        else:
            allowed = evidence.tolerance.allowed((step, evidence.dp_rank, "buffer", name), rounding_error(expected))
            difference = compare_placed(PlacedTensor(Replicate(), parts), expected, allowed)
            compared.append(ComparedParameter(name, expected, parts, (expected,) * tp, difference))
    return compared, not_compared


def _buffer_suspect(evidence: Evidence, step: int, buffer: ComparedParameter) -> Suspect:
    where = {"phase": "update", "step": step, "module": buffer.module, "field": f"buffer {buffer.name}"}
    suspect = tensor_suspect(
        evidence,
        buffer.difference,
        check=_CHECK,
        kind="update",
        where=where,
        expected=buffer.expected,
        actual_parts=buffer.actual_parts,
        expected_parts=buffer.expected_parts,
        is_replicated=True,
    )
    return replace(suspect, replicas=_replica_facts(evidence, step, "buffer", buffer.name))


def _weight_suspects(
    evidence: Evidence,
    step: int,
    wrong: Sequence[ComparedParameter],
    masters: Mapping[str, tuple[torch.Tensor, ...]],
) -> list[Suspect]:
    shares = _shares_of_all(evidence, step)
    clipped = clipped_step(evidence, step, shares)
    norms = norm_facts(evidence, step, clipped)
    suspects: list[Suspect] = []
    for parameter in wrong:
        name = parameter.name
        details: dict[str, Any] = {"first_of": len(wrong)}
        implied = implied_norms(clipped, name)
        is_unknown = bool(clipped.factors) and name not in clipped.factors
        is_clipped = (implied or is_unknown) and _has_right_gradient(evidence, step, name)
        of_parameter = replace(norms, implied=implied) if norms is not None and is_clipped else None
        if of_parameter is not None and not suspects:
            details |= _step_evidence(of_parameter, shares.get(name, {}))
        if name in evidence.frozen:
            details["note"] = "it is frozen: no step may change it"
        elif torch.equal(parameter.expected, evidence.weights_before(step)[name]):
            details["note"] = "the reference's weight is the same as before this step"
        elif _is_unclipped(clipped, parameter):
            details["note"] = "its gradient was not clipped"
        where = {"phase": "update", "step": step}
        suspect = parameter_suspect(evidence, parameter, check=_CHECK, kind="update", where=where, details=details)
        facts = replace(
            _step_facts(evidence, step, name, shares.get(name, {})),
            unlike_masters_on=tuple(evidence.ranks(_unlike_masters(parameter, masters[name]))),
        )
        suspects.append(
            replace(
                suspect,
                step=replace(facts, on_shards=_on_shards(evidence, step, name)),
                norms=of_parameter,
                replicas=_replica_facts(evidence, step, "parameter", name),
            )
        )
    return suspects


def _has_right_gradient(evidence: Evidence, step: int, name: str) -> bool:
    """Return whether no more is wrong with the gradient of a parameter than a step shows to be clipped otherwise."""
    expected = evidence.reference[step].gradients.get(name)
    if expected is None:
        return True
    compared, _ = compare_parameters(
        evidence,
        {name: expected},
        [rank.gradients for rank in evidence.candidate[step]],
        lambda name, expected: evidence.tolerance.allowed((step, "gradient", name), rounding_error(expected)),
    )
    return all(parameter.difference.agrees for parameter in compared.values())


def _is_unclipped(clipped: ClippedStep, parameter: ComparedParameter) -> bool:
    """Return whether every wrong rank left a gradient as it is that the reference clips."""
    factors, wrong = clipped.factors.get(parameter.name, ()), parameter.difference.wrong_tp_ranks()
    is_left = all(abs(factors[rank] - 1) <= RESIDUAL_EXACT for rank in wrong) if factors else False
    return is_left and clipped.expected < 1 - RESIDUAL_EXACT


def _skipped_on(evidence: Evidence, step: int) -> tuple[int, ...]:
    """Return the ranks that skipped a step which the reference takes."""
    if evidence.reference[step].is_skipped:
        return ()
    skipped = tuple(tp_rank for tp_rank, rank in enumerate(evidence.candidate[step]) if rank.is_skipped)
    return tuple(evidence.ranks(skipped))


def _on_shards(evidence: Evidence, step: int, name: str) -> tuple[torch.Tensor, ...]:
    by_rank = evidence.on_shards[step] if evidence.on_shards else ()
    return tuple(weights[name] for weights in by_rank if name in weights)


def _replica_facts(evidence: Evidence, step: int, kind: str, name: str) -> ReplicaFacts:
    """Return where replicas of a parameter or buffer differ for another reason than a drift in this step."""
    over_dp = [evidence.topology.peers(rank, "dp") for rank in evidence.tp_group if kind == "parameter"]
    over_tp = [evidence.tp_group] if kind == "buffer" or evidence.layouts[name].is_replicated else []

    def differ(moment: int, kind: str, groups: Sequence[Sequence[int]]) -> bool:
        return any(replicas_differ(evidence, moment, (kind, name), group) for group in groups)

    return ReplicaFacts(
        differ_over_dp=differ(step + 1, kind, over_dp),
        differed_at_start=differ(0, kind, over_dp + over_tp),
        gradients_differ=differ(step + 1, "gradient", over_dp + over_tp),
    )


def _step_facts(evidence: Evidence, step: int, name: str, ratios: Mapping[str, tuple[float, ...]]) -> StepFacts:
    """Return how the step on a parameter is made up of its terms; what is no such sum has no ratios and no momentum."""
    layout = evidence.layouts[name]
    before, after = evidence.weights_before(step)[name], evidence.reference[step].weights[name]
    facts = StepFacts(
        ratios=ratios,
        ratio_digits=6 if evidence.dtype == "float64" else 3,  # RESIDUAL_EXACT, FITTED_RELATIVE_ERROR
        loss_scale=evidence.reference[step].loss_scale,
        next_loss_scale=evidence.reference[step].next_loss_scale,
        skipped_on=_skipped_on(evidence, step),
    )
    if tuple(before.shape) != tuple(layout.shape) or torch.equal(after, before):
        return facts
    facts = replace(facts, before=layout.parts(before))
    terms = terms_of_step(evidence, step, name)
    if len(terms) < len(TERMS) or layout.is_replicated or len(set(layout.local_shapes)) > 1:
        return facts
    shares = shares_of([term.double().reshape(-1) for term in terms], (after - before).double().reshape(-1))
    if shares is None or not isfinite(shares[-1]):
        return facts
    return replace(facts, momentum_parts=layout.parts(terms[-1]), momentum_share=shares[-1])


def _step_evidence(facts: NormFacts, shares: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """Return what the norm of a step could be, where several mistakes give it, and whether the report is right.

    Args:
        shares: The share of each term in every rank's step on the parameter over the expected share: clipping changes
            that of the gradient alone.
    """
    could_be = explain_norm(facts.of_implied, facts.norms).could_be
    is_reported = facts.reported and all(abs(norm - facts.expected) <= facts.noise * norm for norm in facts.reported)
    of_others = [share for term, of_ranks in shares.items() if term != TERMS[0] for share in of_ranks]
    is_another = facts.of_implied.is_wrong and all(abs(share - 1) <= RESIDUAL_EXACT for share in of_others)
    return {
        **({"norm_could_be": list(could_be)} if could_be else {}),
        **(
            {"reported": "the right norm: only the step is clipped by another one"}
            if is_reported and is_another
            else {}
        ),
    }
