"""Whether a training that was saved, and gone on with in new processes, is the one that was not interrupted.

Exact at the same topology: rank by rank, bit by bit. At another one whole tensors are compared: bitwise when they were
loaded, and within the measured noise after further steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch

from tpcheck.backends.interface import STEPS_TAKEN
from tpcheck.core.causes import Cause
from tpcheck.core.check_names import RESUME_CHECK
from tpcheck.core.findings import Finding
from tpcheck.numerics.differences import frobenius, frobenius_distance, spacing
from tpcheck.numerics.evidence import WayOutcome
from tpcheck.numerics.tolerance import LEAST_ELEMENTS, Tolerance
from tpcheck.numerics.training_state import StateKey, TrainingState, assemble

OF_GROUP = " of parameter group "
"""Between an option of the optimizer and the number of its group."""

BATCH = "batch"

Moment = tuple[str, int]  # phase, and the last step that was taken


@dataclass(frozen=True, slots=True)
class SavedTraining:
    """What one rank holds of the training that was not interrupted.

    Attributes:
        saved: When it was saved.
        after: After each further step.
        batches: Digests of the micro-batches of every step from the first, where a loop has loaded them itself.
    """

    saved: TrainingState
    after: tuple[TrainingState, ...]
    batches: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ResumedTraining:
    """What one rank holds of the training that goes on in new processes.

    Attributes:
        fresh: Before loading: other weights, and no moments.
        loaded: After loading.
        after: After each further step.
    """

    fresh: TrainingState
    loaded: TrainingState
    after: tuple[TrainingState, ...]


@dataclass(frozen=True, slots=True)
class _Difference:
    """A tensor or number that differs on one rank, or as a whole (`rank` None)."""

    what: str
    name: str | None
    rank: int | None
    observed: float
    allowed: float
    evidence: Mapping[str, Any]
    cause: Cause | None = None


def compare_same_topology(
    way: str, num_before: int, expected: Sequence[SavedTraining], actual: Sequence[ResumedTraining]
) -> WayOutcome:
    """Compare bitwise, rank by rank, up to the first moment at which something differs.

    Generators that differ when they were loaded do not end this: they change nothing before something draws from them.

    Args:
        way: How the training was saved and loaded.
        num_before: How many steps were taken before saving.
        expected, actual: Of all ranks.
    """
    outcome = WayOutcome()
    of_generators: tuple[Finding, ...] = ()
    saved = [rank.saved for rank in expected]
    for moment, expected_states, actual_states in _moments(num_before, expected, actual):
        differences: list[_Difference] = []
        for rank, (of_rank, expected_of_rank) in enumerate(zip(actual_states, expected_states, strict=True)):
            fresh = actual[rank].fresh if moment[0] == "loaded" else None
            compared = [
                *_compare_tensors(rank, of_rank, expected_of_rank, saved, fresh),
                *_compare_numbers(rank, of_rank, expected_of_rank),
                *_compare_batches(rank, moment[1], of_rank.batches, expected[rank].batches),
                *([] if fresh is None else _compare_generators(rank, of_rank, saved, fresh)),
            ]
            outcome.not_compared.update(
                {} if fresh is None else {f"{way}: {name}": _NOT_SAVED for name in _not_loaded(of_rank, fresh)}
            )
            for label, difference in compared:
                outcome.margins[f"{way}: {_when(moment)}: {label}, rank {rank}"] = 0.0 if difference is None else inf
            differences += [difference for _, difference in compared if difference is not None]
        kinds = {difference.what for difference in differences}
        if kinds and kinds.issubset(actual[0].fresh.generators):
            of_generators = tuple(_findings(way, moment, differences))
        elif differences:
            follow = bool(of_generators) and BATCH not in kinds
            found = tuple(_findings(way, moment, differences, all_follow=follow))
            return replace(outcome, findings=(*of_generators, *found) if follow else (*found, *of_generators))
    num_steps = {len(rank.after) for rank in actual}
    if num_steps != {len(expected[0].after)}:  # a loop counts them by itself
        evidence = {"resumed": sorted(num_steps), "uninterrupted": len(expected[0].after), "counted": _COUNTED}
        differs = _Difference("steps after loading", None, None, 1.0, 0.0, evidence)
        of_generators += tuple(_findings(way, ("resumed", num_before + min(num_steps) - 1), [differs]))
        outcome.margins[f"{way}: {differs.what}"] = inf
    return replace(outcome, findings=of_generators)


def compare_other_topology(
    way: str,
    num_before: int,
    expected: Sequence[SavedTraining],
    actual: Sequence[ResumedTraining],
    tolerance: Tolerance,
) -> WayOutcome:
    """Compare whole tensors: bitwise when they were loaded, weights within the measured noise after further steps.

    Args:
        way: How the training was saved and loaded, and at which sizes.
        num_before: How many steps were taken before saving.
        expected, actual: Of all ranks of each side, whose numbers may be unequal.
        tolerance: Of the whole training: what rounding adds up to since the first step.
    """
    outcome = WayOutcome()
    for moment, expected_states, actual_states in _moments(num_before, expected, actual):
        wholes, expected_wholes = assemble(actual_states), assemble(expected_states)
        held = {key for state in expected_states for key in state.tensors if key.kind != "buffer"}
        differences = list(_compare_numbers(None, actual_states[0], expected_states[0], ignored=_OF_TOPOLOGY))
        for key in sorted(held, key=lambda key: (key.kind, key.name, key.state)):
            label = f"{key.name} {key.what}"
            if key not in expected_wholes or (
                key not in wholes and any(key in state.tensors for state in actual_states)
            ):
                outcome.not_compared[f"{way}: {label}"] = "no rank knows which elements it holds"
                continue
            if moment[0] == "loaded":
                difference = _compare_bits(None, key, wholes.get(key), expected_wholes[key])
            elif key.kind == "weight" and key in wholes:
                difference = _compare_calibrated(key, wholes[key], expected_wholes[key], moment[1], tolerance)
            else:
                continue  # moments and masters follow the weights
            differences.append((label, difference))
        for label, found in differences:
            outcome.margins[f"{way}: {_when(moment)}: {label}"] = _margin(found)
        wrong = [found for _, found in differences if found is not None and _margin(found) > 1]
        if wrong:
            return WayOutcome(outcome.margins, tuple(_findings(way, moment, wrong)), outcome.not_compared)
    return outcome


_OF_TOPOLOGY = ("loss scale",)


def _moments(
    num_before: int, expected: Sequence[SavedTraining], actual: Sequence[ResumedTraining]
) -> Iterator[tuple[Moment, list[TrainingState], list[TrainingState]]]:
    """Yield each moment with the states of all ranks, expected and actual."""
    yield ("loaded", num_before - 1), [rank.saved for rank in expected], [rank.loaded for rank in actual]
    for number in range(min(len(expected[0].after), len(actual[0].after))):
        of_expected = [rank.after[number] for rank in expected]
        yield ("resumed", num_before + number), of_expected, [rank.after[number] for rank in actual]


def _when(moment: Moment) -> str:
    phase, step = moment
    return f"loaded after step {step}" if phase == "loaded" else f"step {step}"


def _margin(difference: _Difference | None) -> float:
    if difference is None:
        return 0.0
    return difference.observed / difference.allowed if difference.allowed else inf


# ---- tensors


def _compare_tensors(
    rank: int,
    actual: TrainingState,
    expected: TrainingState,
    saved: Sequence[TrainingState],
    fresh: TrainingState | None,
) -> Iterator[tuple[str, _Difference | None]]:
    for key, tensor in expected.tensors.items():
        found = actual.tensors.get(key)
        difference = _compare_bits(rank, key, None if found is None else found.values, tensor.values)
        if difference is not None and found is not None:
            explained = _explain(_WrongTensor(key, found.values, rank, expected, saved, fresh))
            if explained is not None:
                cause, evidence = explained
                difference = replace(difference, evidence={**difference.evidence, **evidence}, cause=cause)
        yield f"{key.name} {key.what}", difference
    for key in actual.tensors:
        if key not in expected.tensors:
            evidence = {"differs": "structure"}
            yield (
                f"{key.name} {key.what}",
                _Difference(key.what, key.name, rank, 1.0, 0.0, evidence, Cause.TENSOR_UNEXPECTED),
            )


def _compare_bits(
    rank: int | None, key: StateKey, actual: torch.Tensor | None, expected: torch.Tensor
) -> _Difference | None:
    if actual is None:
        return _Difference(key.what, key.name, rank, float(expected.numel()), 0.0, {}, Cause.TENSOR_MISSING)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        shapes = {
            "shape_actual": list(actual.shape),
            "shape_expected": list(expected.shape),
            "dtype_actual": str(actual.dtype).removeprefix("torch."),
            "dtype_expected": str(expected.dtype).removeprefix("torch."),
        }
        return _Difference(key.what, key.name, rank, float(expected.numel()), 0.0, shapes)
    if same_bits(actual, expected):
        return None
    differing = ~((actual == expected) | ((actual != actual) & (expected != expected)))
    count = int(differing.sum()) or 1  # zeros of unlike signs
    evidence: dict[str, Any] = {"count_differing": count, "count_total": expected.numel()}
    return _Difference(key.what, key.name, rank, float(count), 0.0, evidence)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two tensors are equal to the bit; NaN equals the same NaN."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    return torch.equal(*(side.contiguous().reshape(-1).view(torch.uint8) for side in (actual, expected)))


def _compare_calibrated(
    key: StateKey, actual: torch.Tensor, expected: torch.Tensor, step: int, tolerance: Tolerance
) -> _Difference | None:
    size = frobenius(expected) or 1.0
    allowed = tolerance.allowed((step, "weight", key.name), spacing(expected)) / size
    observed = frobenius_distance(actual, expected) / size
    if not observed:
        return None
    evidence = {"replays": tolerance.num_replays, "dtype": str(expected.dtype).removeprefix("torch.")}
    return _Difference(key.what, key.name, None, observed, allowed, evidence)


# ---- causes


@dataclass(frozen=True, slots=True)
class _WrongTensor:
    """A tensor that is not what it should be, and what it can be compared with.

    Attributes:
        key: Its name.
        values: What this rank holds.
        rank: The rank.
        expected: All that this rank should hold.
        saved: What each rank held when it was saved.
        fresh: What this rank held before it loaded; None after further steps.
    """

    key: StateKey
    values: torch.Tensor
    rank: int
    expected: TrainingState
    saved: Sequence[TrainingState]
    fresh: TrainingState | None


_Explained = tuple[Cause, Mapping[str, Any]]


def _explain(wrong: _WrongTensor) -> _Explained | None:
    """Return the first cause that the bits show, with its evidence."""
    if wrong.values.numel() < LEAST_ELEMENTS:
        return None
    return next((explained for test in _TESTS if (explained := test(wrong)) is not None), None)


def _no_numbers(wrong: _WrongTensor) -> _Explained | None:
    if wrong.values.is_floating_point() and not bool(wrong.values.isfinite().any()):
        return Cause.NOT_FINITE, {}
    return None if bool(wrong.values.any()) else (Cause.ALL_ZERO, {})


def _not_loaded_at_all(wrong: _WrongTensor) -> _Explained | None:
    before = None if wrong.fresh is None else wrong.fresh.tensors.get(wrong.key)
    if before is None or not same_bits(wrong.values, before.values):
        return None
    if wrong.key.kind == "master":
        return Cause.MASTERS_STALE, {"note": "the master is what the new process held before it loaded"}
    return Cause.NOT_LOADED, {}


def _of_another_rank(wrong: _WrongTensor) -> _Explained | None:
    for other, state in enumerate(wrong.saved):
        tensor = state.tensors.get(wrong.key)
        if other != wrong.rank and tensor is not None and same_bits(wrong.values, tensor.values):
            is_of_model = wrong.key.kind in ("weight", "buffer")
            cause = Cause.SHARD_REPEATED if is_of_model else Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK
            return cause, {"equals_rank": other, "note": f"it is what rank {other} saved"}
    return None


def _master_of_rounded_weight(wrong: _WrongTensor) -> _Explained | None:
    weight = wrong.expected.tensors.get(StateKey("weight", wrong.key.name))
    if wrong.key.kind != "master" or weight is None or weight.values.dtype == wrong.values.dtype:
        return None
    if not same_bits(wrong.values.reshape(-1), weight.values.reshape(-1).to(wrong.values.dtype)):
        return None
    rounded_to = str(weight.values.dtype).removeprefix("torch.")
    note = f"it is made from the {rounded_to} weight: what the master held beyond it is lost"
    return Cause.DTYPE_ROUNDED, {"rounded_to": rounded_to, "note": note}


def _of_another_parameter(wrong: _WrongTensor) -> _Explained | None:
    for key, tensor in wrong.expected.tensors.items():
        same_kind = (key.kind, key.state) == (wrong.key.kind, wrong.key.state)
        if same_kind and key != wrong.key and same_bits(wrong.values, tensor.values):
            return Cause.TENSOR_OF_ANOTHER_LAYER, {"equals": key.name}
    return None


_TESTS = (_no_numbers, _not_loaded_at_all, _of_another_rank, _master_of_rounded_weight, _of_another_parameter)


# ---- numbers


def _compare_numbers(
    rank: int | None, actual: TrainingState, expected: TrainingState, ignored: Sequence[str] = ()
) -> Iterator[tuple[str, _Difference | None]]:
    for name in dict.fromkeys([*expected.numbers, *actual.numbers]):
        if name in ignored:
            continue
        found, wanted = (state.numbers.get(name, "none") for state in (actual, expected))
        difference = None
        if found != wanted:
            evidence: dict[str, Any] = {"resumed": found, "uninterrupted": wanted, "counted": _COUNTED}
            difference = _Difference(name, None, rank, 1.0, 0.0, evidence, _cause_of_number(name, found, wanted))
        yield name, difference
    if actual.loss is not None and expected.loss is not None and rank is not None:
        evidence = {"resumed": actual.loss, "uninterrupted": expected.loss, "counted": _COUNTED}
        differs = actual.loss != expected.loss
        yield "loss", _Difference("loss", None, rank, 1.0, 0.0, evidence) if differs else None


_COUNTED = ("number", "differs", "differ")


def _cause_of_number(name: str, actual: Any, expected: Any) -> Cause | None:
    if OF_GROUP in name:
        return Cause.OPTIONS_DIFFER
    if name == STEPS_TAKEN and isinstance(actual, int) and isinstance(expected, int):
        return Cause.SAMPLES_REPEATED if actual < expected else Cause.SAMPLES_SKIPPED
    return None


# ---- batches


def _compare_batches(
    rank: int, step: int, actual: tuple[str, ...], expected: tuple[tuple[str, ...], ...]
) -> Iterator[tuple[str, _Difference | None]]:
    """Compare the micro-batches of a step with those of every step of the training that was not interrupted."""
    if not actual:
        return
    wanted = expected[step] if step < len(expected) else ()
    places = [(number, place) for number, of_step in enumerate(expected) for place in range(len(of_step))]
    difference = None
    unlike = next((place for place, each in enumerate(actual) if each not in wanted[place : place + 1]), None)
    if unlike is None and len(actual) < len(wanted):
        unlike = len(actual)
    if unlike is not None:
        found = [place for place in places if actual[unlike : unlike + 1] == (expected[place[0]][place[1]],)]
        resumed = _name_of(found[0]) if found else "a batch of no step" if unlike < len(actual) else "none"
        uninterrupted = _name_of((step, unlike)) if unlike < len(wanted) else "none"
        evidence = {"resumed": resumed, "uninterrupted": uninterrupted, "counted": ("batch", "differs", "differ")}
        cause = None
        if found:
            cause = Cause.SAMPLES_REPEATED if found[0] < (step, unlike) else Cause.SAMPLES_SKIPPED
        difference = _Difference(BATCH, None, rank, 1.0, 0.0, evidence, cause)
    yield BATCH, difference


def _name_of(place: tuple[int, int]) -> str:
    return f"that of step {place[0]}" + (f", micro-batch {place[1]}" if place[1] else "")


# ---- generators

_NOT_SAVED = "loading leaves it as it is: whatever draws from it, such as dropout, goes on with other numbers"


def _not_loaded(actual: TrainingState, fresh: TrainingState) -> list[str]:
    """Return the generators that loading has left alone."""
    return [name for name, state in actual.generators.items() if fresh.generators.get(name) == state]


def _compare_generators(
    rank: int, actual: TrainingState, saved: Sequence[TrainingState], fresh: TrainingState
) -> Iterator[tuple[str, _Difference | None]]:
    """Compare the states of the generators that loading has set."""
    not_loaded = _not_loaded(actual, fresh)
    for name, state in actual.generators.items():
        if name in not_loaded or name not in saved[rank].generators:
            continue
        difference = None
        if state != saved[rank].generators[name]:
            same = [other for other, of_rank in enumerate(saved) if of_rank.generators.get(name) == state]
            evidence: dict[str, Any] = {"counted": ("generator", "differs", "differ")}
            if same:
                evidence |= {"equals_rank": same[0], "note": f"it is in the state that rank {same[0]} saved"}
            difference = _Difference(name, None, rank, 1.0, 0.0, evidence)
        yield name, difference


# ---- findings


def _findings(
    way: str, moment: Moment, differences: Sequence[_Difference], *, all_follow: bool = False
) -> Iterator[Finding]:
    """Yield a finding for each kind of state and cause: the first name, with all others beside it.

    Other batches come first, then tensors that are explained, then numbers, since these move everything else.
    """
    groups: dict[tuple[str, Cause | None], list[_Difference]] = {}
    for difference in differences:
        groups.setdefault((difference.what, difference.cause), []).append(difference)
    order = sorted(groups.values(), key=lambda group: _rank_of(group[0]))
    for number, group in enumerate(order):
        first = max(group, key=lambda each: (_margin(each), each.observed))
        names = dict.fromkeys(each.name for each in group if each.name not in (None, first.name))
        ranks = sorted({each.rank for each in group if each.rank is not None})
        evidence = dict(first.evidence)
        if names:
            evidence["also"] = list(names)
        if (number or all_follow) and moment[0] == "resumed":
            evidence["follows_from"] = RESUME_CHECK
        yield Finding(
            check=RESUME_CHECK,
            where={
                "phase": moment[0],
                "step": moment[1],
                **({} if first.name is None else {"parameter": first.name}),
                "field": f"{first.what}, {way}",
                **({"ranks": ranks} if ranks else {}),
            },
            observed=first.observed,
            allowed=first.allowed,
            cause=None if first.cause is None else first.cause.slug,
            evidence=evidence,
        )


def _rank_of(difference: _Difference) -> int:
    if difference.what == BATCH:
        return -1
    if difference.name is None:
        return 1
    return 0 if difference.cause is not None else 2
