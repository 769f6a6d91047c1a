"""What each rank's gradients and steps say of norms: norms by parameter, and by what every gradient was multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite, nan, sqrt
from statistics import median

import torch

from tpcheck.core.clipping import EPSILONS, Clipping
from tpcheck.numerics.differences import frobenius
from tpcheck.numerics.evidence import Evidence, NormFacts, Step
from tpcheck.numerics.norms import LOSS_SCALE, ClippedStep, GradientNorms
from tpcheck.numerics.tolerance import (
    ACCURACY_OF_FACTORS,
    DEVIATIONS_OF_SHARES,
    FITTED_RELATIVE_ERROR,
    RESIDUAL_EXACT,
    SAFETY_FACTOR,
)

# The terms that an optimizer step (SGD) is a sum of.
TERMS = ("gradient", "weight", "momentum")
# Dtypes whose optimizers keep masters and moments in float32.
_STEPS_IN_FLOAT32 = ("bfloat16", "float16")


def gradient_norms(evidence: Evidence, step: int) -> GradientNorms:
    """Return the norms of the candidate's gradients of `step`."""
    by_rank, sums, largest = [], [], []
    for rank in evidence.candidate[step]:
        gradients = {
            name: gradient
            for name, gradient in rank.gradients.items()
            if gradient is not None and name in evidence.layouts
        }
        by_rank.append({name: frobenius(gradient) for name, gradient in gradients.items()})
        sums.append({name: float(gradient.double().abs().sum()) for name, gradient in gradients.items()})
        largest.append({name: float(gradient.abs().max()) for name, gradient in gradients.items() if gradient.numel()})
    vectors = frozenset(name for name, layout in evidence.layouts.items() if len(layout.shape) < 2)
    return GradientNorms(
        tuple(by_rank),
        frozenset(name for name, layout in evidence.layouts.items() if layout.is_replicated),
        {1.0: tuple(sums), inf: tuple(largest)},
        {"every vector": vectors, "every matrix": frozenset(evidence.layouts) - vectors},
        evidence.topology.dp,
    )


def norm_facts(evidence: Evidence, step: int, clipped: ClippedStep | None = None) -> NormFacts | None:
    """Return what a wrong norm, or a wrong step, is compared with; None where the reference has no norm."""
    expected = evidence.reference[step].gradient_norm
    if expected is None:
        return None
    reported = [rank.gradient_norm for rank in evidence.candidate[step]]
    known = tuple(norm for norm in reported if norm is not None)
    return NormFacts(
        norms=gradient_norms(evidence, step),
        expected=expected,
        reported=known if len(known) == len(reported) else (),
        step=clipped,
        scales=_scales(evidence, step),
        noise=SAFETY_FACTOR * 2 * evidence.tolerance.scalar_eps,  # of the same gradients in another order
        tolerance=FITTED_RELATIVE_ERROR if evidence.dtype == "float64" else RESIDUAL_EXACT,
    )


def _scales(evidence: Evidence, step: int) -> dict[str, float]:
    """Return by what gradients are multiplied before they are unscaled."""
    micro_batches = len(evidence.reference[step].micro_gradients)
    known = {"the number of micro-batches": float(micro_batches), "the number of replicas": float(evidence.topology.dp)}
    known[LOSS_SCALE] = evidence.reference[step].loss_scale
    return {what: scale for what, scale in known.items() if scale > 1}


def clipped_step(evidence: Evidence, step: int, shares: Mapping[str, Mapping[str, tuple[float, ...]]]) -> ClippedStep:
    """Return by what the gradients of `step` were multiplied.

    Args:
        shares: For each parameter the share of each term in every rank's step over its share in the expected one.
    """
    clipping = evidence.clipping
    expected = clipping.factor(evidence.reference[step].gradient_norm or 0.0)
    factors = {
        name: tuple(expected * ratio for ratio in of_terms[TERMS[0]])
        for name, of_terms in shares.items()
        if TERMS[0] in of_terms
    }
    return ClippedStep(factors, clipping, expected)


def implied_norms(clipped: ClippedStep, name: str) -> tuple[float, ...]:
    """Return the norm by which each rank's gradient of a parameter was clipped; nothing where that is unknown."""
    factors = clipped.factors.get(name, ())
    if clipped.clipping.max_norm <= 0 or not factors or not all(factor > 0 for factor in factors):
        return ()
    return tuple(map(clipped.clipping.norm, factors))


def observed_clipping(evidence: Evidence) -> Clipping:
    """Return the convention by which the candidate clips, read off its steps; the reference's where no other fits.

    Conventions differ in what is added to the norm, and in whether gradients of a small norm are scaled up. The first
    step that is not clipped as the reference's tells: those after it were not taken from the same weights.
    """
    assumed = evidence.clipping
    steps = [number for number, each in enumerate(evidence.reference) if each.weights and each.gradient_norm]
    for step in steps if assumed.max_norm > 0 else ():
        sizes = {
            name: frobenius(gradient)
            for name, gradient in evidence.reference[step].gradients.items()
            if gradient is not None and name in evidence.layouts
        }
        largest = max(sizes, key=sizes.__getitem__, default="")
        of_largest = _factors(evidence, step, [largest] if largest else [])
        if not _fits(of_largest, evidence, step, assumed, _accuracy(evidence)):
            return _fitting(_factors(evidence, step, sizes), evidence, step)
    return assumed


def _factors(evidence: Evidence, step: int, names: Iterable[str]) -> list[float]:
    shares = {name: shares_of_terms(evidence, step, name) for name in names}
    return [factor for of_ranks in clipped_step(evidence, step, shares).factors.values() for factor in of_ranks]


def _fits(factors: Iterable[float], evidence: Evidence, step: int, clipping: Clipping, accuracy: float) -> bool:
    """Return whether all factors are those of a convention."""
    expected = clipping.factor(evidence.reference[step].gradient_norm or 0.0)
    return all(abs(factor - expected) <= accuracy * expected for factor in factors)


def _accuracy(evidence: Evidence) -> float:
    """Return how accurately the step on a large parameter shows its factor."""
    return ACCURACY_OF_FACTORS.get(evidence.dtype, RESIDUAL_EXACT)


def _fitting(factors: Sequence[float], evidence: Evidence, step: int) -> Clipping:
    assumed, norm = evidence.clipping, evidence.reference[step].gradient_norm or 0.0
    factor, accuracy = median(factors) if factors else 0.0, _accuracy(evidence)
    if factor <= 0:
        return assumed
    clipping = replace(assumed, scales_up=assumed.scales_up or (norm < assumed.max_norm and factor > 1))
    if evidence.dtype in ACCURACY_OF_FACTORS:
        epsilon = assumed.max_norm / factor - norm
        epsilon = epsilon if abs(epsilon) > accuracy * norm else 0.0  # less is rounding
        clipping = replace(clipping, epsilon=min(EPSILONS, key=lambda each: abs(each - epsilon)))
    # The factor of a small gradient is known less well than the median.
    of_all = accuracy if evidence.dtype == "float64" else RESIDUAL_EXACT
    fits = _fits([factor], evidence, step, clipping, accuracy) and _fits(factors, evidence, step, clipping, of_all)
    return clipping if fits else assumed


def terms_of_step(evidence: Evidence, step: int, name: str) -> list[torch.Tensor]:
    """Return the accumulated gradient, the weight and the step before, where there is one; nothing without gradient."""
    before = evidence.weights_before(step)[name]
    updated = [number for number in range(step) if evidence.reference[number].weights]
    accumulated = evidence.reference[updated[-1] + 1 if updated else 0 : step + 1]
    gradients = [gradient for earlier in accumulated if (gradient := earlier.gradients[name]) is not None]
    if not gradients:
        return []
    momentum = [before - evidence.weights_before(updated[-1])[name]] if updated else []
    return [torch.stack(gradients).sum(dim=0), before, *momentum]


def shares_of_terms(evidence: Evidence, step: int, name: str) -> dict[str, tuple[float, ...]]:
    """Return for each term its share in every rank's step on a parameter over its share in the expected one.

    Weights are rounded after the step, in float32 by more than a small one shows; what the optimizer keeps shows the
    shares there: a moment, or the change of the master weight where there is none, or none that is such a sum.
    """
    if evidence.dtype != "float64":
        states = {state for state, of in evidence.reference[step].optimizer_state if of == name}
        of_moments_first = sorted(states, key=lambda state: (state == _MASTER, state))
        in_states = (_shares_in_state(evidence, step, name, state) for state in of_moments_first)
        in_state = next((shares for shares in in_states if shares), {})
        if in_state or evidence.dtype in _STEPS_IN_FLOAT32:
            return in_state
    layout, before = evidence.layouts[name], evidence.weights_before(step)[name]
    terms = terms_of_step(evidence, step, name)
    if not terms or evidence.reference[step].gradient_norm is None:
        return {}
    ratios: list[dict[str, float]] = []
    for tp_rank, rank in enumerate(evidence.candidate[step]):
        local = [layout.local(term, tp_rank).double().reshape(-1) for term in terms]
        start = layout.local(before, tp_rank).double().reshape(-1)
        after = layout.local(evidence.reference[step].weights[name], tp_rank).double().reshape(-1)
        actual = rank.weights[name].double().reshape(-1) if name in rank.weights else start[:0]
        expected_shares, shares = (
            shares_of(local, end - start) if end.shape == start.shape else None for end in (after, actual)
        )
        if expected_shares is None or shares is None:
            return {}
        of_terms = zip(TERMS, expected_shares, shares, strict=False)  # a first step has no momentum
        known = ((term, share / expected) for term, expected, share in of_terms if expected)
        ratios.append({term: ratio for term, ratio in known if isfinite(ratio)})
    return {term: tuple(ratio[term] for ratio in ratios) for term in TERMS if all(term in ratio for ratio in ratios)}


def _shares_in_state(evidence: Evidence, step: int, name: str, state: str) -> dict[str, tuple[float, ...]]:
    """Return the shares of gradient and weight in what a step has made of a state, where that is a sum of them.

    Of a moment that is its value, with what it was: SGD's, Adam's first. Of a master weight it is its change, as SGD
    without momentum makes it. Each side's is held against its own gradient, which is the other's but for the rounding
    of low precision.
    """
    layout, expected = evidence.layouts[name], _terms_of_state(evidence.reference, evidence.initial, step, name, state)
    ratios: list[dict[str, float]] = []
    for tp_rank in range(len(evidence.candidate[step])):
        steps = [ranks[tp_rank] for ranks in evidence.candidate]
        actual = _terms_of_state(steps, evidence.initial_parts[tp_rank], step, name, state)
        if not expected or not actual or tuple(expected[0].shape) != tuple(layout.shape):
            return {}
        local = [layout.local(term, tp_rank) for term in expected]
        expected_shares, shares = (
            shares_of(
                [term.double().reshape(-1) for term in side[1:]],
                side[0].double().reshape(-1),
                rounding=_rounding_of_change(side[2]) if state == _MASTER else 0.0,
                accuracy=RESIDUAL_EXACT,
            )
            for side in (local, actual)
        )
        if expected_shares is None or shares is None:
            return {}
        pairs = zip(TERMS[:2], expected_shares, shares, strict=False)
        known = ((term, share / of_reference) for term, of_reference, share in pairs if of_reference)
        ratios.append({term: ratio for term, ratio in known if isfinite(ratio)})
    return {term: tuple(ratio[term] for ratio in ratios) for term in TERMS if all(term in ratio for ratio in ratios)}


_MASTER = "master"


def _rounding_of_change(master: torch.Tensor) -> float:
    """Return the Frobenius norm of the most that rounding makes of a master's change: half its spacing, each."""
    return frobenius(master) * torch.finfo(master.dtype).eps / 2


def _terms_of_state(
    steps: Sequence[Step], initial: Mapping[str, torch.Tensor], step: int, name: str, state: str
) -> list[torch.Tensor]:
    """Return what a step has made of a state, then what it may be a sum of: gradient, weight before, moment before."""
    after, gradient = steps[step].optimizer_state.get((state, name)), steps[step].gradients.get(name)
    before = steps[step - 1].optimizer_state if step else {}
    weight = before.get((_MASTER, name), initial.get(name))
    if state == _MASTER and after is not None and weight is not None and after.shape == weight.shape:
        weight = weight.to(after.dtype)
        known = [after.double() - weight.double(), gradient, weight]
    else:
        known = [after, gradient, weight, *([before.get((state, name))] if step else [])]
    present = [tensor for tensor in known if tensor is not None]
    are_alike = len(present) == len(known) and len({tuple(tensor.shape) for tensor in present}) == 1
    return present if are_alike else []


def shares_of(
    terms: Sequence[torch.Tensor],
    move: torch.Tensor,
    *,
    rounding: float = 0.0,
    accuracy: float = FITTED_RELATIVE_ERROR,
) -> list[float] | None:
    """Return the share of each term in the move, or None where the move is no such sum.

    A share is nan where rounding hides it, as that of a gradient that is mathematically zero beside weight decay.

    Args:
        rounding: Frobenius norm of the most that rounding has made of the move, where a float64 has less. It rounds
            each element by itself, so that a share is off by the error of one.
        accuracy: Relative error up to which a share must be known.
    """
    if move.numel() <= 2 * len(terms) or not bool(move.isfinite().all()):
        return None
    columns = torch.stack(list(terms), dim=1)
    sizes = torch.linalg.vector_norm(columns, dim=0)
    if not bool(torch.all(sizes > 0)):
        return None
    solution = torch.linalg.lstsq(columns / sizes, move[:, None]).solution[:, 0]
    remaining = torch.linalg.vector_norm(columns / sizes @ solution - move)
    if float(remaining) > max(FITTED_RELATIVE_ERROR * float(torch.linalg.vector_norm(move)), rounding):
        return None
    noise = DEVIATIONS_OF_SHARES * remaining / sqrt(move.numel()) if rounding else remaining
    is_hidden = accuracy * solution.abs() < noise
    return [float(share) for share in (solution / sizes).masked_fill(is_hidden, nan)]
