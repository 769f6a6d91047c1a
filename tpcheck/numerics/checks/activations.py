"""Compares the inputs and outputs of every module, and their gradients, with the reference's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

from tpcheck.core.placement import Partial, Shard
from tpcheck.numerics.activation_placement import PlacedTensor, cut_by_sample, infer_placement, placement_of_features
from tpcheck.numerics.checks.suspects import compare_parameters
from tpcheck.numerics.data_flow import (
    collectives_behind,
    consumers,
    feeding,
    is_exchanged_behind,
    is_inside,
    is_result,
)
from tpcheck.numerics.differences import (
    Difference,
    compare_placed,
    distance_of_terms,
    frobenius,
    frobenius_distance,
    projection,
    rounding_error,
    subtract,
)
from tpcheck.numerics.evidence import Evidence, MarginsByModule, Phase, TensorKey, worst_by_module
from tpcheck.numerics.tolerance import RESIDUAL_NOISY


def first_wrong_activations(evidence: Evidence, step: int, activations: ComparedActivations) -> list[TensorKey]:
    """Return the wrong activations of a phase that no wrong one feeds, in order.

    What was not compared agrees with nothing: a wrong tensor behind it feeds what is computed from it.
    """
    wrong = {activation.key for activation in activations.wrong()}

    def is_fed_by_wrong(root: TensorKey) -> bool:
        nearest = nearest_compared(evidence, step, feeding(evidence, step, root), activations)
        return any(each in wrong and each not in evidence.forced_inputs for each in nearest)

    roots = first_divergences(list(activations.by_key), wrong.__contains__)
    return [root for root in roots if not is_fed_by_wrong(root)] or roots


def nearest_compared(
    evidence: Evidence, step: int, start: Iterable[TensorKey], activations: ComparedActivations
) -> Iterator[TensorKey]:
    """Yield those of `start` that were compared, and in place of another the nearest ones that it is computed from."""
    seen: set[TensorKey] = set()
    waiting = list(start)
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        if key in activations.by_key:
            yield key
        else:
            waiting.extend(feeding(evidence, step, key))


def first_divergences(events: Sequence[TensorKey], is_wrong: Callable[[TensorKey], bool]) -> list[TensorKey]:
    """Return the wrong events that no wrong event feeds, in order.

    The result of a module (its outputs; backward, the gradients of its inputs) depends on what goes into it and on all
    that happens inside. What goes into a module depends on all that happened before in its parent.

    Args:
        events: The events of one phase of one step, in order.
        is_wrong: Whether an event differs from the reference.
    """
    called = {event.module for event in events}
    wrong_before: list[TensorKey] = []
    roots = []
    for event in events:
        if is_wrong(event):
            scope = scope_of(event, called)
            if not any(is_inside(earlier.module, scope) for earlier in wrong_before):
                roots.append(event)
            wrong_before.append(event)
    return roots


def scope_of(event: TensorKey, called: Collection[str]) -> str:
    """Return the module whose code computes the event: for what goes into a module, its nearest parent that is called.

    Containers such as a ModuleList are never called.
    """
    module = event.module
    if is_result(event):
        return module
    while module:
        module = module.rpartition(".")[0]
        if module in called:
            break
    return module


@dataclass(frozen=True, slots=True)
class ComparedActivation:
    """One activation on both sides, with its difference.

    Attributes:
        is_recomputed: Activation checkpointing computed it a second time, in the backward pass.
    """

    key: TensorKey
    expected: Any
    placed: PlacedTensor
    difference: Difference
    is_recomputed: bool = False


@dataclass(frozen=True, slots=True)
class ComparedActivations:
    """All activations of one phase of one step, in the reference's order of events."""

    by_key: Mapping[TensorKey, ComparedActivation]
    not_compared: Mapping[str, str]
    modules: tuple[str, ...] = ()  # those that were called, also where nothing was compared

    def wrong(self) -> list[ComparedActivation]:
        return [activation for activation in self.by_key.values() if not activation.difference.agrees]

    def margins(self) -> dict[str, float]:
        return {str(key): activation.difference.margin for key, activation in self.by_key.items()}

    def by_module(self) -> MarginsByModule:
        """Return the worst margin of each module: forward of its outputs, backward of all its gradients."""
        compared: list[MarginsByModule] = [
            {(key.phase, key.module): activation.difference.margin}
            for key, activation in self.by_key.items()
            if key.phase == "backward" or is_result(key)
        ]
        return worst_by_module({("forward", module): None for module in self.modules}, *compared)


def compare_activations(evidence: Evidence, step: int, phase: Phase) -> ComparedActivations:
    """Compare every activation of a phase by the placement that its parts show."""
    compared: dict[TensorKey, ComparedActivation] = {}
    not_compared: dict[str, str] = {}
    reference = evidence.reference[step].activations
    candidates = [rank.activations for rank in evidence.candidate[step]]
    batch_size = next((len(expected) for expected in reference.values() if expected.dim() == 3), 1)
    called_less = _modules_called_less(reference, candidates)
    for key, expected in _expected_activations(evidence, step, phase):
        if key.module in called_less:
            not_compared[str(key)] = "called less often than in the unsharded model: which calls match is unknown"
            continue
        recorded = [recorded_by_rank(activations, key, reference) for activations in candidates]
        parts = [part for part in recorded if part is not None]
        if len(parts) < len(candidates):
            not_compared[str(key)] = "not seen on every rank of the sharded model"
            continue
        placed = infer_placement(expected.shape, parts, placement_of_features(evidence, key))
        if placed is None:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            not_compared[str(key)] = f"the ranks' shapes {shapes} do not make up {tuple(expected.shape)}"
            continue
        is_recomputed = key not in reference
        first_call = replace(key, call=0) if is_recomputed else key
        allowed = evidence.tolerance.allowed((step, evidence.dp_rank, first_call), rounding_error(expected))
        alternatives = [placed, *cut_by_sample(placed, expected, batch_size)]
        differences = [(compare_placed(each, expected, allowed), each) for each in alternatives]
        difference, placed = min(differences, key=lambda pair: pair[0].error)
        compared[key] = ComparedActivation(key, expected, placed, difference, is_recomputed)
    judged: dict[TensorKey, ComparedActivation] = {}
    for key, activation in compared.items():
        known = key in evidence.forced_inputs
        reinterpreted = activation if known else _with_other_placement(evidence, step, compared, activation)
        if reinterpreted is None:
            not_compared[str(key)] = "shard order unknown: shapes alone do not determine it; the parent module agrees"
        else:
            judged[key] = reinterpreted
    modules = dict.fromkeys(key.module for key in reference if key.phase == phase == "forward")
    return ComparedActivations(judged, not_compared, tuple(modules))


def recorded_by_rank(
    activations: Mapping[TensorKey, Any], key: TensorKey, reference: Mapping[TensorKey, Any]
) -> Any | None:
    """Return a rank's tensor; where reentrant checkpointing computes gradients in a second call alone, that one's."""
    second = replace(key, call=1)
    if key in activations or key.phase == "forward" or key.call or second in reference:
        return activations.get(key)
    return activations.get(second)


def _expected_activations(evidence: Evidence, step: int, phase: Phase) -> Iterator[tuple[TensorKey, Any]]:
    """Yield the reference's activations, then those that the candidate computes a second time.

    Activation checkpointing calls a module again in the backward pass; a module that the reference calls once must
    compute the same both times.
    """
    reference = evidence.reference[step].activations
    yield from ((key, expected) for key, expected in reference.items() if key.phase == phase)
    candidate = evidence.candidate[step][0].activations if phase == "forward" else {}
    for key in candidate:
        first_call = replace(key, call=0)
        if key.phase == phase and key.call == 1 and key not in reference and first_call in reference:
            yield key, reference[first_call]


def _modules_called_less(
    reference: Mapping[TensorKey, Any], candidates: Sequence[Mapping[TensorKey, Any]]
) -> frozenset[str]:
    """Return the modules that a rank calls less often than the reference.

    See `families.special_cases.EXPERTS_CALLED_ONCE_EACH`.
    """
    expected, *actual = (
        Counter(module for module, *_ in {(key.module, key.call, key.micro_batch) for key in activations})
        for activations in (reference, *candidates)
    )
    return frozenset(module for calls in actual for module in expected if 0 < calls[module] < expected[module])


def _with_other_placement(
    evidence: Evidence, step: int, compared: Mapping[TensorKey, ComparedActivation], activation: ComparedActivation
) -> ComparedActivation | None:
    """Return a wrong activation by another placement, where a right result shows that there is one.

    A module may leave its reduction to what comes after it (experts, an input gradient): the ranks' terms must add up,
    in all features or in some (`families.special_cases.MLA_SHARED_ROTARY_KEY`), with its bias on each rank or on none,
    and what is computed from them must be right, or no terms any more although nothing has summed them yet. Or, where
    the result of its parent is right, it may keep its shard in an order that shapes do not show: return None, the
    activation cannot be compared.
    """
    if activation.difference.agrees:
        return activation
    result = _result_of_parent(compared, activation)
    parent_is_right = result is not None and result.difference.agrees
    if isinstance(activation.placed.placement, Shard):
        return activation if activation.placed.is_fused or not parent_is_right else None
    terms = _as_terms(evidence, step, activation)
    if terms is None:
        return activation
    are_summed = parent_is_right or _are_summed_later(evidence, step, compared, activation.key)
    return terms if are_summed or _are_spoilt_later(evidence, step, compared, activation.key) else activation


def _are_spoilt_later(
    evidence: Evidence, step: int, compared: Mapping[TensorKey, ComparedActivation], key: TensorKey
) -> bool:
    """Return whether terms would be summed later, and are no terms any more before: the mistake is in between.

    Where a collective stands behind what still are terms, their sum is what is wrong, unless something else is that is
    added to them. What are terms in some features alone are none behind a weight.
    """
    are_known = all(rank.logs_collectives for rank in evidence.candidate[step])
    if not are_known or not _are_terms_in_all_features(compared[key]) or not is_exchanged_behind(evidence, step, key):
        return False
    waiting, seen = [key], {key}
    while waiting:
        terms = waiting.pop()
        nearest, issued = collectives_behind(evidence, step, terms, 0, key.module)
        if issued:
            if (
                nearest is None
                or nearest not in compared
                or not has_another_mistake(compared[nearest], compared[terms].placed.parts)
            ):
                return False
            continue
        for after in consumers(evidence, step, terms):
            activation = compared.get(after)
            if after not in seen and activation is not None and _as_terms(evidence, step, activation) is not None:
                seen.add(after)
                waiting.append(after)
    return True


def _are_terms_in_all_features(activation: ComparedActivation) -> bool:
    """Return whether parts add up as a whole: the gradients of two branches may be reduced and not reduced."""
    total = reduce(add, (part.double() for part in activation.placed.parts))
    is_sum = frobenius_distance(total, activation.expected.double()) <= activation.difference.allowed
    return activation.key.phase == "forward" or is_sum


def has_another_mistake(result: ComparedActivation, terms: Sequence[Any]) -> bool:
    """Return whether the error of what is computed from terms is none of their sum: it is no combination of them.

    False where that cannot be told: the result has another shape.
    """
    if any(term.shape != result.expected.shape for term in terms):
        return False
    for tp_rank, part in enumerate(result.placed.parts):
        error = subtract(part, result.placed.expected_part(result.expected, tp_rank)).reshape(-1)
        of_rank = [result.placed.expected_part(term, tp_rank).double().reshape(-1) for term in terms]
        if frobenius(error - projection(error, of_rank)) > max(
            result.difference.allowed, RESIDUAL_NOISY * frobenius(error)
        ):
            return True
    return False


def _as_terms(evidence: Evidence, step: int, activation: ComparedActivation) -> ComparedActivation | None:
    """Return an activation whose full parts add up to the expected one as `Partial`; None for another.

    A row-parallel layer whose caller sums may add its bias on each rank or on none: the caller sets that right.
    """
    if not activation.placed.is_replicated:
        return None
    parts = activation.placed.parts
    bias = _bias(evidence, step, activation)
    surplus = [0.0] if bias is None else [0.0, bias * (1 - 1 / len(parts)), -bias / len(parts)]  # of each part
    distances = (distance_of_terms([part - each for part in parts], activation.expected) for each in surplus)
    error = next((distance for distance in distances if distance <= activation.difference.allowed), None)
    if error is None:
        return None
    difference = replace(activation.difference, error=error, part_errors=(0.0,) * len(parts))
    return replace(activation, placed=PlacedTensor(Partial(), parts), difference=difference)


def _bias(evidence: Evidence, step: int, activation: ComparedActivation) -> Any | None:
    """Return the only bias of a layer, or of that which an adapter wraps, where its output is compared."""
    key, expected = activation.key, activation.expected
    if key.role != "output" or key.phase != "forward" or expected.dim() < 2:
        return None
    biases = [
        weight
        for name, weight in evidence.weights_before(step).items()
        if name.endswith(".bias") and is_inside(name, key.module) and weight.shape == expected.shape[-1:]
    ]
    return biases[0].to(expected) if len(biases) == 1 else None


def _are_summed_later(
    evidence: Evidence, step: int, compared: Mapping[TensorKey, ComparedActivation], key: TensorKey
) -> bool:
    """Return whether something that is computed from terms of a sum shows that they were summed before.

    It is right, or the same on all ranks, or right on some, where no rank has its own terms: then what is wrong is
    wrong for another reason.
    It may be terms itself, such as what the parent of a row-parallel layer returns. Where nothing before it needs a
    gradient, as before the first adapters of a frozen model, it is the gradients of the module's own parameters.
    """
    if _gives_right_gradients(evidence, step, key):
        return True
    for after in consumers(evidence, step, key):
        activation = compared.get(after)
        if activation is None:
            continue
        if activation.difference.agrees or _shows_a_sum(evidence, step, compared, activation):
            return True
        if _as_terms(evidence, step, activation) is not None and _are_summed_later(evidence, step, compared, after):
            return True
    return False


def _shows_a_sum(
    evidence: Evidence, step: int, compared: Mapping[TensorKey, ComparedActivation], result: ComparedActivation
) -> bool:
    """Return whether a wrong gradient is a sum over the ranks all the same."""
    key, parts, allowed = result.key, result.placed.parts, result.difference.allowed
    if key.phase == "forward" or not result.placed.is_replicated or len(parts) < 2:
        return False
    terms = [compared[each].placed.parts for each in feeding(evidence, step, key) if each in compared]
    own = [
        reduce(add, of_rank)
        for of_rank in zip(*terms, strict=True)
        if all(t.shape == result.expected.shape for t in of_rank)
    ]
    if len(own) < len(parts):
        return False
    has_own_terms = any(frobenius_distance(*pair) <= allowed for pair in zip(parts, own, strict=True))
    is_equal = all(frobenius_distance(part, parts[0]) <= allowed for part in parts)
    is_right_on_some = any(frobenius_distance(part, result.expected) <= allowed for part in parts)
    return (is_equal or is_right_on_some) and not has_own_terms


def _gives_right_gradients(evidence: Evidence, step: int, key: TensorKey) -> bool:
    """Return whether the backward pass of a module ends here, with right gradients of its own parameters."""
    backward, result = evidence.reference[step].activations, replace(key, role="input")
    if is_result(key) or key.phase == "forward" or any(replace(result, path=each.path) == each for each in backward):
        return False
    gradients = {
        name: gradient
        for name, gradient in evidence.reference[step].gradients.items()
        if name.rpartition(".")[0] == key.module and gradient is not None
    }
    compared, _ = compare_parameters(
        evidence,
        gradients,
        [rank.gradients for rank in evidence.candidate[step]],
        lambda name, expected: evidence.tolerance.allowed((step, "gradient", name), rounding_error(expected)),
    )
    return bool(compared) and all(parameter.difference.agrees for parameter in compared.values())


def _result_of_parent(
    compared: Mapping[TensorKey, ComparedActivation], inner: ComparedActivation
) -> ComparedActivation | None:
    """Return the first result of the nearest parent of `inner` that was compared, of the same computation."""
    module = inner.key.module
    while module:
        module = module.rpartition(".")[0]
        for activation in compared.values():
            key = activation.key
            is_of_same_pass = key.micro_batch == inner.key.micro_batch
            is_of_same_pass &= activation.is_recomputed == inner.is_recomputed
            if key.module == module and is_result(key) and is_of_same_pass:
                return activation
    return None
