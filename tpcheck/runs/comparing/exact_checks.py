"""Checks that need no measure of rounding: groups, batches, replicas, steps that were not taken, options, bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.findings import Finding
from tpcheck.numerics.sketch import distance
from tpcheck.runs.comparing.alignment import AlignedStep, Run, begins_with, pass_samples
from tpcheck.runs.comparing.comparisons import Comparer, Key, Table, label_of
from tpcheck.runs.comparing.run_findings import BATCHES, GROUPS, REPLICAS, UPDATES, Answer, exact_finding, stale
from tpcheck.runs.trace.records import StepRecord, TensorRecord
from tpcheck.runs.trace.wholes import epsilon

# Options that choose how a step is computed, not what it is.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable", "params", "initial_lr", "name", "param_names"}


# ---- groups and batches


def groups_agree(run: Run) -> Answer:
    """Do the ranks of each group name the same ranks?"""
    margins, wrong = {}, []
    for axis in ("tp", "dp"):
        for rank, trace in run.ranks.items():
            group = trace.tp_group if axis == "tp" else trace.dp_group
            margins[f"{axis} group of rank {rank}"] = 0.0
            others = [run.ranks[peer] for peer in group if peer in run.ranks]
            groups = [other.tp_group if axis == "tp" else other.dp_group for other in others]
            if group and (rank not in group or any(other != group for other in groups)):
                wrong.append((axis, rank))
    findings = []
    if wrong:
        axis = wrong[0][0]
        ranks = [rank for of_axis, rank in wrong if of_axis == axis]
        listed = {str(rank): list(run.ranks[rank].tp_group) for rank in ranks} if axis == "tp" else {}
        where = {"phase": "start", "field": f"{axis} group", "ranks": ranks}
        findings.append(
            exact_finding(
                GROUPS,
                where,
                len(ranks),
                ("rank", "names another group", "name other groups"),
                evidence={"groups": listed},
            )
        )
    return Answer(GROUPS, -1, margins, tuple(findings))


def batches_agree(run: Run, step: AlignedStep) -> Answer:
    """Was each TP group called with the same tensors on all of its ranks? Not asked where no rank's are."""
    margins, findings = {}, []
    for group in run.replicas if run.tp > 1 else ():
        records = [(rank, step.actual[rank]) for rank in group if rank in step.actual]
        leaves = {
            rank: [(leaf.name, leaf.digest) for call in record.passes for leaf in call.leaves]
            for rank, record in records
            if record.has_update == records[0][1].has_update
        }
        if len(leaves) < 2:
            continue
        counts = Counter(map(tuple, leaves.values()))
        margins[f"inputs of ranks {', '.join(map(str, group))}"] = 0.0
        if len(counts) == 1:
            continue
        usual, number = counts.most_common(1)[0]
        deviating = [rank for rank, named in leaves.items() if number == 1 or tuple(named) != usual]
        first = next(iter(leaves.values()))
        names = {name for named in leaves.values() for name, _ in {*named} ^ {*first}}
        where = {"step": step.number, "field": ", ".join(sorted(names)), "ranks": sorted(deviating)}
        findings.append(exact_finding(BATCHES, where, len(names), ("input", "differs", "differ")))
    return Answer(BATCHES, step.number, margins, tuple(findings[:1]))


# ---- replicas


def replicas_agree(
    run: Run,
    table: Table,
    before: Table,
    step: int,
    expected: Answer | None = None,
    wrong: frozenset[str] | None = frozenset(),
) -> Answer:
    """Do ranks that hold the same elements have the same bits?

    Args:
        table: Of this step, or of the start.
        before: Of the time before the step.
        expected: The answer for the expected run: what drifts there, too, is not asked for.
        wrong: Parameters that findings of this step are about, which accounts for their replicas; None for all.
    """
    margins: dict[str, float] = {}
    deviating: dict[Key, list[int]] = {}
    known = set(expected.not_compared) if expected is not None else set()
    for key, records in table.items():
        if key[0] not in ("weight", "buffer", "master", "state"):
            continue
        for replicas in _replicas_of(run, key, records):
            label = label_of(key)
            margins[label] = 0.0
            differing = _deviating({rank: records[rank].digest for rank in replicas})
            if differing and label not in known:
                deviating.setdefault(key, []).extend(differing)
    drifted = {label_of(key): "its replicas differ" for key in deviating}
    if not deviating:
        return Answer(REPLICAS, step, margins)
    by_kind = sorted(deviating, key=lambda key: ("weight", "buffer", "master", "state").index(key[0]))
    alone = [key for key in by_kind if wrong is not None and key[1] not in wrong]
    order = alone or by_kind
    first = order[0]
    ranks = sorted({rank for key in order for rank in deviating[key]})
    were_equal = all(
        not _deviating({rank: before[key][rank].digest for rank in ranks_of if rank in before[key]})
        for key in order
        if key in before
        for ranks_of in _replicas_of(run, key, before[key])
    )
    cause = Explanation(Cause.REPLICA_DRIFT) if step >= 0 and were_equal and alone else None
    where = {
        **({"phase": "update", "step": step} if step >= 0 else {"phase": "start"}),
        **({"parameter": first[1]} if first[0] != "buffer" else {"module": first[1].rpartition(".")[0]}),
        "field": label_of(first),
        "ranks": ranks,
    }
    others = {key[1]: key[0] for key in reversed(order) if key[1] != first[1]}  # the first kind of each name
    evidence: dict[str, Any] = {
        "count_differing": len(order),
        "also": [{"kind": kind, "name": name} for name, kind in reversed(others.items())],
    }
    finding = exact_finding(REPLICAS, where, len(order), ("tensor", "differs", "differ"), cause, evidence)
    return Answer(REPLICAS, step, margins, (finding,), drifted if expected is None else {})


def _replicas_of(run: Run, key: Key, records: Mapping[int, TensorRecord]) -> Iterator[tuple[int, ...]]:
    """Yield the ranks that should hold the same bits: of a layout that is known the same piece, else of one TP rank."""
    groups: dict[Any, list[int]] = {}
    for group_number, group in enumerate(run.replicas):
        for tp_rank, rank in enumerate(group):
            if rank not in records or not records[rank].readings:
                continue
            reading = records[rank].readings[0]
            is_known = reading.label in ("layout", "whole") and len(records[rank].readings) == 1
            piece: Any = reading.piece if is_known else (reading.piece, tp_rank)
            replica = group_number if key[0] == "buffer" else 0  # running statistics are of each replica's samples
            groups.setdefault((piece, replica, records[rank].shape), []).append(rank)
    yield from (tuple(ranks) for ranks in groups.values() if len(ranks) > 1)


def _deviating(digests: Mapping[int, str]) -> list[int]:
    """Return the ranks that differ from the majority; all of them where there is none."""
    counts = Counter(digests.values()).most_common()
    if len(counts) < 2:
        return []
    majority = counts[0][0] if counts[0][1] > counts[1][1] else None
    return [rank for rank, digest in digests.items() if digest != majority]


# ---- steps that were not taken


def steps_were_taken(
    comparer: Comparer, actual: Mapping[int, StepRecord], expected: Mapping[int, StepRecord], number: int
) -> Answer:
    """Did an optimizer step end this step on every rank where one ended the expected run's?

    Args:
        actual, expected: The records of this step, by rank.
    """
    run = comparer.actual
    idle = [rank for rank in run.members if rank in actual and not actual[rank].has_update and actual[rank].passes]
    other_ranks_step = any(step.has_update for step in actual.values())
    expected_steps = bool(expected) and all(step.has_update for step in expected.values())
    is_same_batch = expected_steps and any(
        begins_with(actual[rank], expected, comparer.expected.replicas) for rank in idle
    )
    margins = {f"optimizer step on rank {rank}": 0.0 for rank in run.members if rank in actual}
    if not idle or not (other_ranks_step or is_same_batch):
        return Answer(UPDATES, number, margins)
    names = _trained(comparer, actual, expected)
    named = names[0] if names else ""
    where = {"phase": "update", "step": number, "parameter": named, "ranks": idle}
    evidence = {
        "also": names[1:],
        "first_of": len(names),
        "calls_without_step": {str(rank): len(actual[rank].passes) for rank in idle},
        "steps_taken": {str(rank): run.ranks[rank].num_steps for rank in run.members},
    }
    skipped = [rank for rank in idle if actual[rank].is_skipped]
    note = "no optimizer step followed these calls of the model on these ranks"
    note += f"; their gradients were dropped on ranks {', '.join(map(str, skipped))}" if skipped else ""
    explanation = Explanation(Cause.STALE_WEIGHT, evidence={"note": note})
    finding = exact_finding(UPDATES, where, len(idle), ("rank", "took no step", "took no step"), explanation, evidence)
    return Answer(UPDATES, number, margins, (finding,))


def _trained(comparer: Comparer, actual: Mapping[int, StepRecord], expected: Mapping[int, StepRecord]) -> list[str]:
    """Return the parameters that the step trains, by the names of the expected run where it has the step."""
    names = dict.fromkeys(
        comparer.names.renamed(record.name, is_actual=steps is actual)
        for steps in (expected, actual)
        for step in steps.values()
        for record in step.tensors
        if record.kind == "gradient"
    )
    if not names:
        names = dict.fromkeys(
            comparer.names.renamed(record.name, is_actual=True)
            for record in comparer.actual.first.initial
            if record.kind == "weight"
        )
    return list(names)


_LAST_BITS = 2  # in units of epsilon: the sketch of a large float32 tensor is itself rounded by half of one
_ROUND_STEPS_AWAY = ("float16", "bfloat16")  # a small step may round to nothing in all elements of a norm


def weights_moved(step: int, tables: BeforeAndAfter, actual: Table) -> Answer:
    """Did every weight that the expected run's step moved move on every rank?

    Args:
        actual: The actual run's gradients: a shard without any, such as rows of tokens that no sample has, stays.
    """
    unmoved: dict[str, list[int]] = {}
    margins = {}
    for key, after_e in tables.expected_after.items():
        before, before_e = tables.actual_before.get(key), tables.expected_before.get(key)
        if key[0] != "weight" or not (before and before_e) or not _is_moved(before_e, after_e):
            continue
        records = tables.actual_after.get(key)
        if any(record.dtype in _ROUND_STEPS_AWAY for record in before.values()):
            continue
        if records is None:  # weights that no optimizer has are not recorded again
            margins[f"{label_of(key)} moves"] = 0.0
            unmoved[key[1]] = sorted(before)
            continue
        margins[f"{label_of(key)} moves"] = 0.0
        idle = [rank for rank, record in records.items() if rank in before and before[rank].digest == record.digest]
        idle = [rank for rank in idle if _has_gradient(actual.get(("gradient", key[1], "", 0), {}), records, rank)]
        if idle:
            unmoved[key[1]] = idle
    if not unmoved:
        return Answer(UPDATES, step, margins)
    first = next(iter(unmoved))
    ranks = sorted({rank for unmoved_on in unmoved.values() for rank in unmoved_on})
    where = {"phase": "update", "step": step, "parameter": first, "ranks": ranks}
    evidence = {"also": [name for name in unmoved if name != first], "first_of": len(unmoved)}
    finding = exact_finding(
        UPDATES, where, len(unmoved), ("parameter", "did not move", "did not move"), stale(len(unmoved)), evidence
    )
    return Answer(UPDATES, step, margins, (finding,))


def _is_moved(before: Mapping[int, TensorRecord], after: Mapping[int, TensorRecord]) -> bool:
    """Return whether the weights changed on every rank, by more than the last bits of their elements."""
    for rank, record in after.items():
        if rank not in before or before[rank].digest == record.digest:
            return False
        if record.dtype in _ROUND_STEPS_AWAY or _is_rounding(before[rank], record):
            return False
    return True


def _is_rounding(before: TensorRecord, after: TensorRecord) -> bool:
    """Return whether a weight moved by its last bits alone: in the other run such a step may round to nothing.

    A bias of keys has no gradient but its rounding, of which SGD makes steps as small.
    """
    for first, then in zip(before.readings[:1], after.readings[:1], strict=False):
        if first.label == then.label and first.piece == then.piece:
            last_bits = _LAST_BITS * epsilon(after.dtype) * sqrt(max(then.sketch.sum_squares, 0.0))
            return distance(then.sketch, first.sketch) <= last_bits
    return False


def _has_gradient(gradients: Mapping[int, TensorRecord], weights: Mapping[int, TensorRecord], rank: int) -> bool:
    """Return whether a rank's part of a weight has a gradient other than zero, as its own or a replica's shows."""
    pieces = {rank: record.readings[0].piece for rank, record in weights.items() if record.readings}
    known = [
        reading.sketch.sum_squares > 0
        for other, record in gradients.items()
        for reading in record.readings[:1]
        if other == rank or pieces.get(other) == pieces.get(rank)
    ]
    return any(known)


@dataclass(frozen=True, slots=True)
class BeforeAndAfter:
    """Weights and states of both runs around a step; empty where they were not recorded."""

    actual_before: Table
    actual_after: Table
    expected_before: Table
    expected_after: Table


# ---- options of the optimizers


def differing_options(comparer: Comparer, step: AlignedStep) -> dict[str, dict[str, Any]]:
    """Return the options in which the optimizers differ, for each parameter: both values, by option."""
    actual, expected = (
        options_of(comparer, steps, is_actual=is_actual)
        for steps, is_actual in ((step.actual, True), (step.expected, False))
    )
    differing: dict[str, dict[str, Any]] = {}
    for name, options in actual.items():
        expected_options = expected.get(name, {})
        for option in options.keys() & expected_options.keys() - _IMPLEMENTATION:
            if _plain(options[option]) != _plain(expected_options[option]):
                differing.setdefault(name, {})[option] = (options[option], expected_options[option])
    return differing


def options_of(comparer: Comparer, steps: Mapping[int, StepRecord], *, is_actual: bool) -> dict[str, Mapping[str, Any]]:
    """Return the options of the optimizers of a step by the parameter that they step."""
    return {
        comparer.names.renamed(name, is_actual=is_actual): group.options
        for step in steps.values()
        for group in step.groups
        for name in group.parameters
    }


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def options_as_evidence(differing: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options that differ, by name: those of the first parameter for which they do."""
    shown: dict[str, Any] = {}
    for options in differing.values():
        for option, (actual, expected) in options.items():
            shown.setdefault(f"{option}_actual", actual)
            shown.setdefault(f"{option}_expected", expected)
    return shown


def optimizer_of(comparer: Comparer, steps: Mapping[int, StepRecord], name: str) -> str:
    """Return the class of the optimizer that steps a parameter of the actual run; empty where it is unknown."""
    for step in steps.values():
        for group in step.groups:
            if any(comparer.names.renamed(each, is_actual=True) == name for each in group.parameters):
                return group.optimizer
    return ""


def options_finding(step: int, differing: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Return the finding that the optimizers are given other options."""
    first, *others = differing
    where = {"phase": "update", "step": step, "parameter": first}
    evidence = {**options_as_evidence(differing), "also": others, "first_of": len(differing)}
    return exact_finding(
        UPDATES,
        where,
        len(differing),
        ("parameter", "has other options", "have other options"),
        Explanation(Cause.OPTIONS_DIFFER),
        evidence,
    )


# ---- bits of two equal runs


def are_alike(actual: Run, expected: Run) -> bool:
    """Return whether two runs differ in nothing that their traces tell, so that their bits should be the same."""
    first, other = actual.first, expected.first
    return (
        actual.replicas == expected.replicas
        and first.versions == other.versions
        and first.dtype == other.dtype
        and first.source == other.source
    )


def same_start(actual: Run, expected: Run) -> bool:
    """Return whether the bits of all weights, buffers and states before the first step are the same on all ranks."""
    return all(
        {record.key: record.digest for record in actual.ranks[rank].initial}
        == {record.key: record.digest for record in expected.ranks[rank].initial}
        for rank in actual.members
    )


def same_inputs(step: AlignedStep) -> bool:
    """Return whether all ranks of two runs alike were called with the same bits, with generators in the same state."""

    def inputs(record: StepRecord) -> list[Any]:
        return [([(leaf.name, leaf.digest) for leaf in call.leaves], dict(call.generators)) for call in record.passes]

    return step.actual.keys() == step.expected.keys() and all(
        inputs(step.actual[rank]) == inputs(step.expected[rank]) for rank in step.actual
    )


def first_other_bits(step: AlignedStep) -> tuple[Key, list[int]] | None:
    """Return the first tensor of a step, in the order of events, whose bits differ, and the ranks where they do."""
    for rank, record in step.actual.items():
        digests = {tensor.key: tensor.digest for tensor in step.expected[rank].tensors}
        for tensor in record.tensors:
            if digests.get(tensor.key, tensor.digest) != tensor.digest:
                ranks = [
                    other
                    for other in step.actual
                    if _digest_of(step.actual[other], tensor.key) != _digest_of(step.expected[other], tensor.key)
                ]
                return tensor.key, ranks
    return None


def _digest_of(record: StepRecord, key: Key) -> str | None:
    return next((tensor.digest for tensor in record.tensors if tensor.key == key), None)


def drew_other_random_numbers(step: AlignedStep, actual: Run, expected: Run) -> bool:
    """Return whether the forward passes of both runs draw random numbers, and not the same for the same samples.

    They draw the same where each call has the same samples in the same order, and the generators begin and end it in
    the same states: another number of samples, or features that are cut over the ranks, draw another amount.
    """
    if step.shared is None:
        return False
    drawn_a, drawn_e = (
        _calls_that_draw(steps, [run.replicas[replica][0] for replica in replicas])
        for run, steps, replicas in (
            (actual, step.actual, step.shared.actual),
            (expected, step.expected, step.shared.expected),
        )
    )
    return bool(drawn_a and drawn_e) and drawn_a != drawn_e


def _calls_that_draw(steps: Mapping[int, StepRecord], ranks: Sequence[int]) -> set[tuple[Any, ...]]:
    """Return the samples and the states of the generators of the calls that left these in another state.

    A call that ended in an error, or was recorded by a version that did not look, has no state after it.
    """
    return {
        (pass_samples(call), *(tuple(sorted(states.items())) for states in (call.generators, call.generators_after)))
        for rank in ranks
        if rank in steps
        for call in steps[rank].passes
        if call.generators_after and call.generators != call.generators_after
    }
