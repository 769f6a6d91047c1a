"""Compares the inputs and outputs of every module, and their gradients, with the reference's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpcheck.core.placement import Partial, Shard
from tpcheck.numerics.activation_placement import PlacedTensor, cut_by_sample, infer_placement, placement_of_features
from tpcheck.numerics.differences import Difference, compare_placed, distance_of_terms, rounding_error
from tpcheck.numerics.evidence import Evidence, Phase, TensorKey


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


def is_inside(module: str, scope: str) -> bool:
    """Return whether `module` is `scope` or one of its submodules."""
    return not scope or module == scope or module.startswith(f"{scope}.")


def is_result(event: TensorKey) -> bool:
    """Return whether the module computes the event, rather than receives it."""
    return event.role == ("output" if event.phase == "forward" else "input")


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

    def wrong(self) -> list[ComparedActivation]:
        return [activation for activation in self.by_key.values() if not activation.difference.agrees]

    def margins(self) -> dict[str, float]:
        return {str(key): activation.difference.margin for key, activation in self.by_key.items()}


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
        recorded = [_recorded(activations, key, reference) for activations in candidates]
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
        reinterpreted = activation if key in evidence.forced_inputs else _with_other_placement(compared, activation)
        if reinterpreted is None:
            not_compared[str(key)] = "shard order unknown: shapes alone do not determine it; the parent module agrees"
        else:
            judged[key] = reinterpreted
    return ComparedActivations(judged, not_compared)


def _recorded(activations: Mapping[TensorKey, Any], key: TensorKey, reference: Mapping[TensorKey, Any]) -> Any:
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
    compared: Mapping[TensorKey, ComparedActivation], activation: ComparedActivation
) -> ComparedActivation | None:
    """Return a wrong activation by another placement, where the right result of its parent shows that there is one.

    A module may leave its reduction to its parent (experts, an input gradient): the ranks' terms must add up, in all
    features or in some (`families.special_cases.MLA_SHARED_ROTARY_KEY`). Or it may keep its shard in an
    order that shapes do not show: return None, the activation cannot be compared.
    """
    result = None if activation.difference.agrees else _result_of_parent(compared, activation)
    if result is None or not result.difference.agrees:
        return activation
    if isinstance(activation.placed.placement, Shard):
        return activation if activation.placed.is_fused else None
    parts = activation.placed.parts
    error = distance_of_terms(parts, activation.expected)
    if error > activation.difference.allowed:
        return activation
    difference = replace(activation.difference, error=error, part_errors=(0.0,) * len(parts))
    return replace(activation, placed=PlacedTensor(Partial(), parts), difference=difference)


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
