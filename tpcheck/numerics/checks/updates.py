"""Are the weights and buffers after an optimizer step the reference's, and the norm that clipping uses?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import hypot
from typing import Any

import torch

from tpcheck.core.placement import Replicate
from tpcheck.numerics.activation_placement import PlacedTensor
from tpcheck.numerics.checks.replicas import replicas_differ
from tpcheck.numerics.checks.suspects import (
    ComparedParameter,
    compare_parameters,
    compare_scalar,
    parameter_suspect,
    tensor_suspect,
)
from tpcheck.numerics.differences import compare_placed, frobenius, rounding_error, spacing
from tpcheck.numerics.evidence import CheckOutcome, Evidence, NormFacts, ReplicaFacts, StepFacts, Suspect
from tpcheck.numerics.tolerance import FITTED_RELATIVE_ERROR


def gradient_norm_matches_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare each rank's gradient norm of `step`. Calibrated."""
    expected = evidence.reference[step].gradient_norm
    actual = [part.gradient_norm for part in evidence.candidate[step]]
    name = "gradient norm"
    if expected is None or any(norm is None for norm in actual):
        return CheckOutcome(not_compared={name: "the backend does not report the norm that it clips by"})
    allowed = evidence.tolerance.allowed_scalar((step, "norm"), expected)
    where = {"phase": "update", "step": step}
    norms = [norm for norm in actual if norm is not None]
    margin, suspect = compare_scalar(
        evidence, "norm", norms, expected, allowed, check="gradient_norm_matches_reference", kind="norm", where=where
    )
    suspects = () if suspect is None else (replace(suspect, norms=norm_facts(evidence, step)),)
    return CheckOutcome({name: margin}, suspects)


def norm_facts(evidence: Evidence, step: int) -> NormFacts:
    """Return the norms of the candidate's gradients, summed up in the usual wrong ways."""
    sharded, replicated = [], []
    for rank in evidence.candidate[step]:
        sizes = {
            name: frobenius(gradient)
            for name, gradient in rank.gradients.items()
            if gradient is not None and name in evidence.layouts
        }
        sharded.append(hypot(*(size for name, size in sizes.items() if not evidence.layouts[name].is_replicated)))
        replicated.append(hypot(*(size for name, size in sizes.items() if evidence.layouts[name].is_replicated)))
    return NormFacts(
        of_ranks=tuple(map(hypot, sharded, replicated)),
        of_ranks_shards=tuple(sharded),
        counting_replicas=hypot(*sharded, *replicated),
    )


_CHECK = "updates_match_reference"


def updates_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare every parameter and buffer after `step`. Calibrated.

    A recorded call of the model that no optimizer step followed has no weights to compare.
    """
    compared, not_compared = compare_parameters(
        evidence,
        evidence.reference[step].weights,
        [rank.weights for rank in evidence.candidate[step]],
        lambda name, expected: evidence.tolerance.allowed((step, "weight", name), spacing(expected)),
    )
    differing = [name for name, parameter in compared.items() if not parameter.difference.agrees]
    for name in (name for name in differing if not _has_gradient(evidence, step, name)):
        del compared[name]
        not_compared[name] = "it has no gradient, and optimizers differ in whether they decay it"
    wrong = [parameter for parameter in compared.values() if not parameter.difference.agrees]
    wrong.sort(key=lambda parameter: -parameter.difference.margin)
    suspects = [_weight_suspect(evidence, step, parameter, len(wrong)) for parameter in wrong]
    buffers, buffers_not_compared = _compare_buffers(evidence, step)
    suspects.extend(_buffer_suspect(evidence, step, buffer) for buffer in buffers if not buffer.difference.agrees)
    margins = {name: parameter.difference.margin for name, parameter in compared.items()}
    margins |= {f"buffer {buffer.name}": buffer.difference.margin for buffer in buffers}
    if not evidence.reference[step].weights:
        not_compared["weights"] = "no optimizer step followed this call"
    return CheckOutcome(margins, tuple(suspects), {**not_compared, **buffers_not_compared})


def _has_gradient(evidence: Evidence, step: int, name: str) -> bool:
    gradients = [rank.gradients[name] for rank in evidence.candidate[step]]
    if evidence.reference[step].gradients[name] is not None:
        return True
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


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


def _weight_suspect(evidence: Evidence, step: int, parameter: ComparedParameter, num_wrong: int) -> Suspect:
    name = parameter.name
    details: dict[str, Any] = {"first_of": num_wrong}
    if torch.equal(parameter.expected, evidence.weights_before(step)[name]):
        details["note"] = "the reference's weight is the same as before this step"
    where = {"phase": "update", "step": step}
    suspect = parameter_suspect(evidence, parameter, check=_CHECK, kind="update", where=where, details=details)
    facts = replace(_step_facts(evidence, step, name), on_shards=_on_shards(evidence, step, name))
    return replace(
        suspect,
        step=facts,
        norms=_norm_facts(evidence, step, facts.ratios.get("gradient", ())) if facts.ratios else None,
        replicas=_replica_facts(evidence, step, "parameter", name),
    )


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


_TERMS = ("gradient", "weight", "momentum")  # an optimizer step (SGD) is a sum of these
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def _step_facts(evidence: Evidence, step: int, name: str) -> StepFacts:
    """Return how the step on a parameter is made up of its terms; what is no such sum has no ratios and no momentum."""
    layout = evidence.layouts[name]
    before, after = evidence.weights_before(step)[name], evidence.reference[step].weights[name]
    terms = _terms_of_step(evidence, step, name, before)
    facts = StepFacts(ratios=_ratios(evidence, step, name, before, terms))
    if tuple(before.shape) != tuple(layout.shape) or torch.equal(after, before):
        return facts
    facts = replace(facts, before=layout.parts(before))
    if len(terms) < len(_TERMS) or layout.is_replicated or len(set(layout.local_shapes)) > 1:
        return facts
    shares = _shares([term.double().reshape(-1) for term in terms], (after - before).double().reshape(-1))
    if shares is None:
        return facts
    return replace(facts, momentum_parts=layout.parts(terms[-1]), momentum_share=shares[-1])


def _terms_of_step(evidence: Evidence, step: int, name: str, before: torch.Tensor) -> list[torch.Tensor]:
    """Return the accumulated gradient, the weight and the step before, where there is one; nothing without gradient."""
    updated = [number for number in range(step) if evidence.reference[number].weights]
    accumulated = evidence.reference[updated[-1] + 1 if updated else 0 : step + 1]
    gradients = [gradient for earlier in accumulated if (gradient := earlier.gradients[name]) is not None]
    if not gradients:
        return []
    momentum = [before - evidence.weights_before(updated[-1])[name]] if updated else []
    return [torch.stack(gradients).sum(dim=0), before, *momentum]


def _ratios(
    evidence: Evidence, step: int, name: str, before: torch.Tensor, terms: Sequence[torch.Tensor]
) -> dict[str, tuple[float, ...]]:
    """Return for each term its share in every rank's step over its share in the expected one."""
    layout = evidence.layouts[name]
    if not terms or evidence.reference[step].gradient_norm is None:
        return {}
    ratios: list[dict[str, float]] = []
    for tp_rank, rank in enumerate(evidence.candidate[step]):
        local = [layout.local(term, tp_rank).double().reshape(-1) for term in terms]
        start = layout.local(before, tp_rank).double().reshape(-1)
        after = layout.local(evidence.reference[step].weights[name], tp_rank).double().reshape(-1)
        actual = rank.weights[name].double().reshape(-1)
        expected_shares, shares = (
            _shares(local, end - start) if end.shape == start.shape else None for end in (after, actual)
        )
        if expected_shares is None or shares is None:
            return {}
        of_terms = zip(_TERMS, expected_shares, shares, strict=False)  # a first step has no momentum
        ratios.append({term: share / expected for term, expected, share in of_terms if expected})
    return {term: tuple(ratio[term] for ratio in ratios) for term in _TERMS if all(term in ratio for ratio in ratios)}


def _shares(terms: Sequence[torch.Tensor], move: torch.Tensor) -> list[float] | None:
    """Return the share of each term in the move, or None where the move is no such sum."""
    if move.numel() <= 2 * len(terms) or not bool(move.isfinite().all()):
        return None
    columns = torch.stack(list(terms), dim=1)
    sizes = torch.linalg.vector_norm(columns, dim=0)
    if not bool(torch.all(sizes > 0)):
        return None
    solution = torch.linalg.lstsq(columns / sizes, move[:, None]).solution[:, 0]
    remaining = torch.linalg.vector_norm(columns / sizes @ solution - move)
    if float(remaining) > FITTED_RELATIVE_ERROR * float(torch.linalg.vector_norm(move)):
        return None
    return [float(share) for share in solution / sizes]


def _norm_facts(evidence: Evidence, step: int, gradient_ratios: Sequence[float]) -> NormFacts | None:
    """Return the norms, with those by which each rank's gradients were clipped, as the ratios imply."""
    expected = evidence.reference[step].gradient_norm
    if expected is None or not gradient_ratios or not all(gradient_ratios):
        return None
    implied = tuple((expected + _CLIP_EPSILON) / ratio - _CLIP_EPSILON for ratio in gradient_ratios)
    return replace(norm_facts(evidence, step), implied=implied)
