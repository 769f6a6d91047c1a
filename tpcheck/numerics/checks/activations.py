"""Compares what entered and left every module, and the gradients of that, with the reference's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpcheck.core.placement import Partial, Placement, Shard
from tpcheck.numerics.differences import Difference, Placed, compare_placed, distance_of_terms, own_rounding, place
from tpcheck.numerics.evidence import Evidence, Phase, TensorKey


def first_divergences(events: Sequence[TensorKey], is_wrong: Callable[[TensorKey], bool]) -> list[TensorKey]:
    """Return the wrong events that nothing wrong feeds, in order.

    What comes out of a module (its outputs; backward, the gradients of its inputs) is fed by what went into it and by
    all that happened inside. What goes into a module is fed by all that happened before in the module around it.

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
    """Return the module whose own code made the event: for what went into a module, the nearest called one around it.

    Containers such as a ModuleList are never called.
    """
    module = event.module
    if comes_out(event):
        return module
    while module:
        module = module.rpartition(".")[0]
        if module in called:
            break
    return module


def is_inside(module: str, scope: str) -> bool:
    """Return whether `module` is `scope` or one of its submodules."""
    return not scope or module == scope or module.startswith(f"{scope}.")


def comes_out(event: TensorKey) -> bool:
    """Return whether the event is a result of its module rather than something handed to it."""
    return event.role == ("output" if event.phase == "forward" else "input")


_UNKNOWN_ORDER = "the ranks' parts make up the whole in an order that nobody tells; the module around it agrees"


@dataclass(frozen=True, slots=True)
class ComparedActivation:
    """One activation on both sides, and how far they are apart.

    Attributes:
        is_again: Activation checkpointing computed it once more, in the backward pass.
    """

    key: TensorKey
    expected: Any
    placed: Placed
    found: Difference
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class ComparedActivations:
    """All activations of one phase of one step, in the reference's order of events."""

    compared: Mapping[TensorKey, ComparedActivation]
    missed: Mapping[str, str]

    def wrong(self) -> list[ComparedActivation]:
        return [one for one in self.compared.values() if not one.found.agrees]

    def margins(self) -> dict[str, float]:
        return {str(key): one.found.margin for key, one in self.compared.items()}


def compare_activations(evidence: Evidence, step: int, phase: Phase) -> ComparedActivations:
    """Compare every activation of a phase by the placement that it really has."""
    compared: dict[TensorKey, ComparedActivation] = {}
    missed: dict[str, str] = {}
    candidates = [part.activations for part in evidence.candidate[step]]
    samples = next((len(whole) for key, whole in evidence.reference[step].activations.items() if whole.dim() == 3), 1)
    skipped = _called_less(evidence.reference[step].activations, candidates)
    for key, expected in _expected(evidence, step, phase):
        if key.module in skipped:
            missed[str(key)] = "called less often than in the unsharded model: nobody tells which call is which"
            continue
        seen = [_seen(activations, key, evidence.reference[step].activations) for activations in candidates]
        parts = [part for part in seen if part is not None]
        if len(parts) < len(candidates):
            missed[str(key)] = "not seen on every rank of the sharded model"
            continue
        placed = place(expected.shape, parts, _weight_hint(evidence, key))
        if placed is None:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            missed[str(key)] = f"the ranks' shapes {shapes} do not make up {tuple(expected.shape)}"
            continue
        is_again = key not in evidence.reference[step].activations
        measured = replace(key, call=0) if is_again else key
        allowed = evidence.tolerance.allowed((step, evidence.dp_rank, measured), own_rounding(expected))
        readings = [placed, *_by_sample(placed, expected, samples)]
        differences = [(compare_placed(reading, expected, allowed), reading) for reading in readings]
        found, placed = min(differences, key=lambda one: one[0].error)
        compared[key] = ComparedActivation(key, expected, placed, found, is_again)
    judged = {
        key: one if key in evidence.fed else _judged_by_surroundings(compared, one) for key, one in compared.items()
    }
    unknown = {str(key): _UNKNOWN_ORDER for key, one in judged.items() if one is None}
    return ComparedActivations({key: one for key, one in judged.items() if one is not None}, missed | unknown)


def _seen(activations: Mapping[TensorKey, Any], key: TensorKey, reference: Mapping[TensorKey, Any]) -> Any:
    """Return what a rank recorded; where reentrant checkpointing makes gradients in a second call alone, that one's."""
    again = replace(key, call=1)
    if key in activations or key.phase == "forward" or key.call or again in reference:
        return activations.get(key)
    return activations.get(again)


def _expected(evidence: Evidence, step: int, phase: Phase) -> Iterator[tuple[TensorKey, Any]]:
    """Yield the reference's activations, then once more those that the candidate computes a second time.

    Activation checkpointing calls a module again in the backward pass; a module that the reference calls once must
    make the same of it both times.
    """
    reference = evidence.reference[step].activations
    yield from ((key, whole) for key, whole in reference.items() if key.phase == phase)
    again = evidence.candidate[step][0].activations if phase == "forward" else {}
    for key in again:
        first = replace(key, call=0)
        if key.phase == phase and key.call == 1 and key not in reference and first in reference:
            yield key, reference[first]


def _by_sample(placed: Placed, expected: Any, samples: int) -> Iterator[Placed]:
    """Yield the reading of a cut along the first dim where that counts heads within samples.

    See `families.special_cases.ALIBI_HEADS_WITHIN_SAMPLES`.
    """
    shard, tp = placed.placement, len(placed.parts)
    if not isinstance(shard, Shard) or shard.dim != 0 or samples < 2 or len(expected) % samples:
        return
    sizes = tuple(len(part) // samples for part in placed.parts)
    if all(len(part) % samples == 0 for part in placed.parts) and sum(sizes) * samples == len(expected) and tp > 1:
        yield Placed(Shard(0, blocks=(sum(sizes),) * samples, sizes=(sizes,) * samples), placed.parts)


def _called_less(reference: Mapping[TensorKey, Any], candidates: Sequence[Mapping[TensorKey, Any]]) -> frozenset[str]:
    """Return the modules that a rank calls less often than the reference, as experts do.

    See `families.special_cases.EXPERTS_CALLED_ONCE_EACH`.
    """
    expected, *actual = [_num_calls(activations) for activations in (reference, *candidates)]
    return frozenset(module for calls in actual for module in expected if 0 < calls[module] < expected[module])


def _num_calls(activations: Mapping[TensorKey, Any]) -> Counter[str]:
    return Counter(module for module, _ in {(key.module, key.call) for key in activations})


def _weight_hint(evidence: Evidence, key: TensorKey) -> Placement | None:
    """Return how the module's weight, [out, in], cuts the features of this activation."""
    layout = evidence.layouts.get(f"{key.module}.weight")
    placement = layout.placement() if layout is not None else None
    features = 0 if key.role == "output" else 1
    return placement if isinstance(placement, Shard) and placement.dim == features else None


def _judged_by_surroundings(
    compared: Mapping[TensorKey, ComparedActivation], one: ComparedActivation
) -> ComparedActivation | None:
    """Return a wrong activation anew where the right result of the module around it shows that it was misread.

    A module may leave its reduction to the one that calls it (experts, an input gradient): the ranks' terms must add
    up, in all features or in some (`families.special_cases.MLA_SHARED_ROTARY_KEY`). Or it may keep its
    shard in an order that shapes do not tell: then nothing can be said of it, and None is returned.
    """
    around = None if one.found.agrees else _result_around(compared, one)
    if around is None or not around.found.agrees:
        return one
    if isinstance(one.placed.placement, Shard):
        return one if one.placed.is_fused else None
    error = distance_of_terms(one.placed.parts, one.expected)
    if error > one.found.allowed:
        return one
    placed = Placed(Partial(), one.placed.parts)
    return replace(one, placed=placed, found=replace(one.found, error=error, part_errors=(0.0,) * len(placed.parts)))


def _result_around(
    compared: Mapping[TensorKey, ComparedActivation], inner: ComparedActivation
) -> ComparedActivation | None:
    """Return the first result of the nearest module around `inner` that was compared, of the same computation."""
    module = inner.key.module
    while module:
        module = module.rpartition(".")[0]
        for one in compared.values():
            if one.key.module == module and comes_out(one.key) and one.is_again == inner.is_again:
                return one
    return None
