"""Compare what two runs saved beside their models: optimizers, schedulers, counts, loss scalers, generators."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from tpcheck.backends.checkpoint_format import NUMBERED, STEP, Checkpoint, HoldsTrainingStates, TrainingStates, Value
from tpcheck.checkpoints.comparison import TensorPair, differing_pairs, explained_findings
from tpcheck.checkpoints.division import Division
from tpcheck.checkpoints.names import match_names
from tpcheck.core.causes import Cause
from tpcheck.core.errors import CheckpointError
from tpcheck.core.findings import Finding
from tpcheck.core.placement import ranks_of_cut
from tpcheck.numerics.checks import CHECKPOINT_CHECK
from tpcheck.numerics.exact.checkpoint_tensor import CheckpointTensor

_ACTUAL, _REFERENCE = "actual", "the reference"
_OPTION = "optimizer group "
# What these say of weights they say of moments, too, and there it means that ranks got the states of others.
_OF_ANOTHER_RANK = {cause.slug for cause in (Cause.SHARD_MISSING, Cause.SHARD_REPEATED, Cause.SHARD_ORDER_SWAPPED)}


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StatesComparison:
    """The result of comparing the training states of two checkpoints.

    Attributes:
        findings: One for each tensor and value that differs.
        compared, total: How many tensors were compared, of how many that the reference has.
        not_compared: Why something was not compared, by name.
    """

    findings: tuple[Finding, ...] = ()
    compared: int = 0
    total: int = 0
    not_compared: Mapping[str, str] = field(default_factory=dict)


def compare_states(
    actual: Checkpoint,
    expected: Checkpoint,
    wrong_weights: Set[str] = frozenset(),
    division: Division | None = None,
) -> StatesComparison:
    """Compare every tensor to the bit and every value.

    Args:
        wrong_weights: Names of parameters whose weights differ: what is wrong with their moments, too, is not a matter
            of the optimizer's states.
        division: Of the work over processes, which all call this; None for all of it.

    Raises:
        CheckpointError: Both sides have states, and the files of one are damaged or hostile.
    """
    division = division or Division.over(None)
    sides = _read(actual, expected)
    if isinstance(sides, StatesComparison):
        return sides
    shared = _with_common_steps(*sides)
    states, reference = (_with_shards(side, model) for side, model in zip(shared, (actual, expected), strict=True))
    actual_of = _matching(states, reference)
    shards = list(_findings_on_shards(states, actual_of))
    pairs = [
        TensorPair(CheckpointTensor(states.tensors, actual_name), CheckpointTensor(reference.tensors, name))
        for name, actual_name in actual_of.items()
        if actual_name not in states.partial and name not in reference.partial
    ]
    same_kind = [pair for pair in pairs if pair.same_shape and pair.same_dtype]
    differing = {pair.expected.name for pair in differing_pairs(same_kind, division)}
    equal = {pair.expected.name for pair in same_kind} - differing
    wrong = [pair for pair in pairs if pair.expected.name not in equal]
    explained = explained_findings(wrong, reference.tensors, {}, {}, division)
    names, wrong_shapes = set(expected.names()), set[Shape]()
    wrong_shapes |= {tuple(expected.shape(name)) for name in wrong_weights if name in names}
    on_tensors = [_on_state(each, wrong_weights, wrong_shapes, reference) for each in explained]
    missing, not_compared = _unmatched(states, reference, actual_of)
    not_compared |= {
        name: "the reference has one rank's shard of it alone"
        for name in reference.partial
        if name in actual_of and actual_of[name] not in states.partial
    }
    on_values = list(_findings_on_values(states.values, reference.values))
    count = len(pairs) + len(shards) + len(missing)
    total = {"count_tensors": count}
    return StatesComparison(
        findings=(
            *(replace(each, evidence={**each.evidence, **total}) for each in (*shards, *on_tensors, *missing)),
            *on_values,
        ),
        compared=len(pairs),
        total=len(reference.tensors.names()),
        not_compared=not_compared,
    )


def _read(actual: Checkpoint, expected: Checkpoint) -> tuple[TrainingStates, TrainingStates] | StatesComparison:
    """Return the states of both sides; where only one has some, what these alone show."""
    sides = {side: _states(checkpoint) for side, checkpoint in ((_ACTUAL, actual), (_REFERENCE, expected))}
    errors = {side: states for side, states in sides.items() if isinstance(states, CheckpointError)}
    first, second = (None if isinstance(states, CheckpointError) else states for states in sides.values())
    if first is not None and second is not None:
        return first, second
    if len(errors) == 2 or (errors and (first is not None or second is not None)):
        raise next(iter(errors.values()))
    not_compared = {f"training states of {side}": f"they cannot be read: {error}" for side, error in errors.items()}
    for side, other, present in ((_ACTUAL, _REFERENCE, first), (_REFERENCE, _ACTUAL, second)):
        if present is not None:
            not_compared[f"training states of {side}"] = f"{other} has none"
    findings = () if first is None else tuple(_findings_on_shards(_with_shards(first, actual), {}))
    count = {"count_tensors": len(first.tensors.names()) if first is not None else 0}
    return StatesComparison(
        tuple(replace(each, evidence={**each.evidence, **count}) for each in findings), not_compared=not_compared
    )


def _states(checkpoint: Checkpoint) -> TrainingStates | CheckpointError | None:
    try:
        return checkpoint.training_states() if isinstance(checkpoint, HoldsTrainingStates) else None
    except CheckpointError as error:
        return error


def _matching(states: TrainingStates, reference: TrainingStates) -> Mapping[str, str]:
    """Return the actual tensor for each of the reference; parameters are matched as those of models are."""
    names, expected = states.tensors.names(), reference.tensors.names()
    matching = match_names(*(tuple(dict.fromkeys(map(_parameter, side))) for side in (names, expected)))
    of_parameter = {actual: name for name, actual in matching.actual_of.items()}
    actual_of = {}
    for actual in names:
        name = of_parameter.get(_parameter(actual), _parameter(actual)) + actual[len(_parameter(actual)) :]
        actual_of[name] = actual
    return {name: actual_of[name] for name in expected if name in actual_of}


def _parameter(name: str) -> str:
    """Return the parameter of `PARAMETER KIND`; `parameter 3 exp_avg` is that of the parameter with this number."""
    return name.rpartition(" ")[0] or name


def _where(name: str) -> dict[str, Any]:
    parameter, _, kind = name.rpartition(" ")
    return {"parameter": parameter, "field": kind} if parameter else {"field": name}


def _on_state(
    finding: Finding, wrong_weights: Set[str], wrong_shapes: Set[Shape], reference: TrainingStates
) -> Finding:
    """Return a finding of the comparison of tensors as one on a state.

    Args:
        wrong_shapes: Of the wrong weights: a parameter that has a number may be any of those of its shape.
    """
    name = finding.where["parameter"]
    where = {**_where(name), **{key: value for key, value in finding.where.items() if key != "parameter"}}
    evidence = {**finding.evidence, "states": True}
    cause = finding.cause
    if cause == Cause.TENSOR_OF_ANOTHER_LAYER.slug and _rank_of_generator(name) is not None:
        equal = _rank_of_generator(str(evidence.get("story", {}).get("equals", "")))
        evidence |= _generator_of_rank(equal) if equal is not None else {}
        return replace(finding, where=where, cause=None, evidence=evidence)
    is_numbered = str(where.get("parameter", "")).startswith(NUMBERED)
    is_of_weights = where.get("parameter") in wrong_weights or (
        is_numbered and tuple(reference.tensors.shape(name)) in wrong_shapes
    )
    if cause in _OF_ANOTHER_RANK and "parameter" in where and not is_of_weights:
        cause = Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK.slug
        evidence["advice"] = Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK.advise()
    return replace(finding, where=where, cause=cause, evidence=evidence)


_GENERATOR = re.compile(r"generators\.(\d+)\.(.+)")


def _rank_of_generator(name: str) -> int | None:
    found = _GENERATOR.match(name)
    return int(found[1]) if found else None


def _generator_of_rank(rank: int) -> dict[str, Any]:
    advice = "Save the generators of each rank in a file, or an entry, of its own, and load them by rank."
    return {"note": f"it is in the state of rank {rank}'s", "advice": advice}


def _with_shards(states: TrainingStates, model: Checkpoint) -> TrainingStates:
    """Add the tensors of the optimizer that have the shape of a shard of a weight which is beside them whole.

    All of them must be cut for one number of ranks. Where the optimizer numbers its parameters, the shapes of all its
    tensors of a kind are compared with those of all weights.
    """
    tied = {name for tie in model.ties for name in sorted(tie)[1:]}
    weights = {name: tuple(model.shape(name)) for name in model.names() if name not in tied}
    by_kind: dict[str, dict[str, Shape]] = {}
    for name in states.tensors.names():
        if " " in name and name not in states.partial:
            by_kind.setdefault(name.rpartition(" ")[2], {})[name] = tuple(states.tensors.shape(name))
    partial: dict[str, Shape] = {}
    for shapes in by_kind.values():
        by_name = {name: weights[_parameter(name)] for name in shapes if _parameter(name) in weights}
        if by_name:
            cut = {name: whole for name, whole in by_name.items() if shapes[name] != whole}
            numbers = {ranks_of_cut(shapes[name], whole) for name, whole in cut.items()}
            partial |= cut if len(numbers) == 1 and None not in numbers else {}
        elif len(shapes) == len(weights):  # else some weights are not trained, so that nothing is known of the others
            whole_of = _wholes(Counter(shapes.values()), Counter(weights.values()))
            partial |= {name: whole_of[shape] for name, shape in shapes.items() if shape in whole_of}
    return replace(states, partial={**states.partial, **partial}) if partial else states


def _wholes(shapes: Counter[Shape], weights: Counter[Shape]) -> dict[Shape, Shape]:
    """Return the whole shape for each one that is a shard's, where all are weights and shards for one number of ranks.

    Each weight has one of them. A shape of which some may be whole weights is left out.
    """
    pairs = {(shape, weight): ranks_of_cut(shape, weight) for shape in shapes for weight in weights}
    for number in sorted({ranks for ranks in pairs.values() if ranks is not None}) if shapes != weights else ():
        fitting = {shape: [weight for weight in weights if pairs[shape, weight] == number] for shape in shapes}
        taken = _assigned(shapes, weights, {shape: [shape, *fitting[shape]] for shape in shapes})
        if taken is not None:
            return {shape: weight for (shape, weight), count in taken.items() if count and not taken[shape, shape]}
    return {}


def _assigned(
    shapes: Counter[Shape], weights: Counter[Shape], fitting: Mapping[Shape, list[Shape]]
) -> Counter[tuple[Shape, Shape]] | None:
    """Return how many of each shape have which weight, if every one can have one that fits it; the first where it can.

    Augmenting paths of bipartite matching (Kuhn, 1955).
    """
    free, taken = Counter(weights), Counter[tuple[Shape, Shape]]()

    def place(shape: Shape, seen: set[Shape]) -> bool:
        for weight in fitting[shape]:
            if weight in seen:
                continue
            seen.add(weight)
            if free[weight]:
                free[weight] -= 1
                taken[shape, weight] += 1
                return True
            for other in [other for other, of in taken if of == weight and taken[other, of]]:
                if other != shape and place(other, seen):
                    taken[other, weight] -= 1
                    taken[shape, weight] += 1
                    return True
        return False

    return taken if all(place(shape, set()) for shape in shapes.elements()) else None


def _findings_on_shards(states: TrainingStates, actual_of: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a finding for each tensor of which one rank's shard alone was saved, for all ranks."""
    expected_names = {actual: name for name, actual in actual_of.items()}
    for name, shape in states.partial.items():
        expected = expected_names.get(name, name)
        local = states.tensors.shape(name)
        story: dict[str, Any] = {"shape_shard": list(local), "shape_whole": list(shape)}
        cut = [size // own for own, size in zip(local, shape, strict=True) if own != size and own]
        evidence = {
            "shape_actual": list(local),
            "shape_expected": list(shape),
            "story": {**story, **({"tp": cut[0]} if len(cut) == 1 else {})},
            "advice": Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK.advise(),
            "states": True,
        }
        cause = Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK.slug
        yield Finding(CHECKPOINT_CHECK, _where(expected), 1.0, 0.0, cause, evidence)


def _unmatched(
    states: TrainingStates, reference: TrainingStates, actual_of: Mapping[str, str]
) -> tuple[list[Finding], dict[str, str]]:
    """Return a finding for each tensor of a parameter that lacks it, and what cannot be compared.

    A parameter of which one side has nothing at all, such as one with a number where the other side has names, and
    generators of ranks that only one side has, are not compared.
    """
    matched = {_parameter(name) for name in actual_of}
    are_lost = _has_lost_its_states(states)
    missing = []
    not_compared = {f"{name} of {_ACTUAL}": why for name, why in states.tensors.unread.items()}
    not_compared |= {f"{name} of {_REFERENCE}": why for name, why in reference.tensors.unread.items()}
    for name in reference.tensors.names():
        if name in actual_of or name in states.tensors.unread:
            continue
        if " " in name and (are_lost or _parameter(name) in matched or matched & _of_optimizer(actual_of)):
            advice = Cause.TENSOR_MISSING.advise()
            evidence: dict[str, Any] = {"only_in": "reference", "story": {}, "advice": advice, "states": True}
            missing.append(Finding(CHECKPOINT_CHECK, _where(name), 1.0, 0.0, Cause.TENSOR_MISSING.slug, evidence))
        else:
            not_compared[name] = f"only {_REFERENCE} has it"
    matched_actual = {*actual_of.values()}
    for name in states.tensors.names():
        if name not in matched_actual:
            not_compared[name] = f"only {_ACTUAL} has it"
    for name in states.values.keys() ^ reference.values.keys():
        not_compared[name] = f"only {_ACTUAL if name in states.values else _REFERENCE} has it"
    return missing, not_compared


def _has_lost_its_states(states: TrainingStates) -> bool:
    """Return whether an optimizer was saved, with its options, and no tensor of any parameter."""
    has_options = any(_OPTION in name for name in states.values)
    return has_options and not states.tensors.unread and not any(" " in name for name in states.tensors.names())


def _of_optimizer(names: Mapping[str, str]) -> Set[str]:
    return {_parameter(name) for name in names if " " in name}


def _findings_on_values(values: Mapping[str, Value], expected: Mapping[str, Value]) -> Iterator[Finding]:
    for name in expected:
        if name in values and not _same(values[name], expected[name]):
            evidence = {"actual": values[name], "expected": expected[name], "counted": _COUNTED, "states": True}
            is_option = _OPTION in name
            advice = {"advice": Cause.OPTIONS_DIFFER.advise()} if is_option else {}
            advice |= next((_generator_of_rank(rank) for rank in _ranks_with(values[name], name, expected)), {})
            cause = Cause.OPTIONS_DIFFER.slug if is_option else None
            yield Finding(CHECKPOINT_CHECK, {"field": name}, 1.0, 0.0, cause, {**evidence, **advice})


def _ranks_with(value: Value, name: str, expected: Mapping[str, Value]) -> Iterator[int]:
    """Yield the ranks whose generator of this kind is in this state."""
    found = _GENERATOR.match(name)
    for other in expected if found else ():
        same_kind = _GENERATOR.match(other)
        if found and same_kind and same_kind[2] == found[2] and expected[other] == value:
            yield int(same_kind[1])


def _with_common_steps(*sides: TrainingStates) -> Iterator[TrainingStates]:
    """Yield both sides with their step counts by the same names: one for all where each side has but one."""
    steps = [{name: count for name, count in side.values.items() if name.endswith(STEP)} for side in sides]
    counts = [{*of_side.values()} for of_side in steps]
    for side, own, count, other in zip(sides, steps, counts, steps[::-1], strict=True):
        others = {name: value for name, value in side.values.items() if name not in own}
        if all(len(each) == 1 for each in counts):
            others["optimizer step"] = next(iter(count))
        elif len(count) == 1:
            others |= dict.fromkeys(other, next(iter(count)))
        else:
            others |= own
        yield replace(side, values=others)


_COUNTED = ("value", "differs", "differ")


def _same(actual: Value, expected: Value) -> bool:
    return actual == expected or (actual != actual and expected != expected)  # NaN
