"""Causes of wrong optimizer state: masters that are stale, moments of another rank, of an earlier step, or lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import hypot, sqrt

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.sketch import FLOAT32_ROUNDING, Sketch, distance
from tpcheck.numerics.tolerance import LEAST_MULTIPLES, RESIDUAL_EXACT
from tpcheck.runs.comparing.alignment import AlignedStep, Run
from tpcheck.runs.comparing.comparisons import Comparer, Table, relative
from tpcheck.runs.comparing.exact_checks import BeforeAndAfter, options_of
from tpcheck.runs.trace.records import Kind
from tpcheck.runs.trace.wholes import epsilon, reading_of, sketch_of_whole, spacing_of_subnormals

_OF_WEIGHTS: tuple[Kind, Kind] = ("master", "weight")


def stale_masters(table: Table, name: str, label: str) -> Explanation | None:
    """Return the cause where a parameter's weights, read as `label`, are not its masters, rounded."""
    found = distance_from_masters(table, name, label)
    if found is None or not found[0] > found[1]:
        return None
    return Explanation(Cause.MASTERS_STALE, evidence={"masters_and_weights_differ_by": found[0]})


def distance_from_masters(table: Table, name: str, label: str) -> tuple[float, float] | None:
    """Return how far a parameter's weights are from its masters, and how far rounding, nearest or not, may take them.

    Both relative to the masters' norm; None where not both are whole.
    """
    masters, weights = (table.get((kind, name, "", 0), {}) for kind in _OF_WEIGHTS)
    whole_master, whole_weight = sketch_of_whole(masters, label), sketch_of_whole(weights, label)
    if whole_master is None or whole_weight is None:
        return None
    if whole_master.numel != whole_weight.numel or not whole_master.sum_squares:
        return None
    dtype = next(iter(weights.values())).dtype
    norm = sqrt(whole_master.sum_squares)
    of_tiny = spacing_of_subnormals(dtype) * sqrt(whole_master.numel) / norm
    of_sketches = sqrt(2) * FLOAT32_ROUNDING
    allowed = hypot(max(epsilon(dtype), epsilon("float32")), of_tiny, of_sketches)
    return relative(distance(whole_master, whole_weight), norm), allowed


def has_unlike_replicas(table: Table, name: str, label: str) -> bool:
    """Return whether ranks hold other bits of one piece of a parameter's weights or masters."""
    bits: dict[tuple[str, str], set[str]] = {}
    for kind in _OF_WEIGHTS:
        for record in table.get((kind, name, "", 0), {}).values():
            if (reading := reading_of(record, label)) is not None:
                bits.setdefault((kind, reading.piece), set()).add(record.digest)
    return any(len(digests) > 1 for digests in bits.values())


def replaced_state(comparer: Comparer, step: AlignedStep, around: BeforeAndAfter, name: str) -> Explanation | None:
    """Return what a parameter's moments were before or after a step, where they are not the expected run's."""
    label, label_e = comparer.readings.get(name, ("", ""))
    for actual, expected in (
        (around.actual_before, around.expected_before),
        (around.actual_after, around.expected_after),
    ):
        found = repeated_state(actual, comparer.actual, name, label)
        if found is not None and repeated_state(expected, comparer.expected, name, label_e) is None:
            return found
    found = state_taken_before(around, comparer.actual, name, label)
    if found is not None:
        return found
    options = options_of(comparer, step.expected, is_actual=False).get(name, {})
    for key in [key for key in around.expected_after if key[:2] == ("state", name)]:
        after, after_e, before_e = (
            sketch_of_whole(table.get(key, {}), of_run)
            for table, of_run in (
                (around.actual_after, label),
                (around.expected_after, label_e),
                (around.expected_before, label_e),
            )
        )
        if after is not None and after_e is not None and before_e is not None:
            found = stale_or_lost(key[2], after, after_e, before_e, tuple(_decays(options)))
            if found is not None:
                return found
    return None


def state_taken_before(around: BeforeAndAfter, run: Run, name: str, label: str) -> Explanation | None:
    """Return the cause where the optimizer got, on a rank, what the step before had left on one with another shard."""
    for key in [key for key in around.actual_after if key[:2] == ("state", name)]:
        left = around.actual_before.get(key, {})
        pieces = {rank: reading for rank in left if (reading := reading_of(left[rank], label)) is not None}
        taken = {
            str(rank): other
            for group in run.replicas
            for rank in group
            for other in group
            if rank in pieces and other in pieces and pieces[rank].piece != pieces[other].piece
            if pieces[other].sketch.numel > 1 and pieces[other].sketch.sum_squares
            if rank in around.actual_after[key] and around.actual_after[key][rank].digest_before == left[other].digest
        }
        if taken:
            evidence = {"state": key[2], "state_of_rank": taken}
            return Explanation(Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK, evidence=evidence)
    return None


def stale_or_lost(
    state: str, after: Sketch, after_e: Sketch, before_e: Sketch, decays: tuple[float, ...]
) -> Explanation | None:
    """Return the cause of a moment that is that of the step before, or was zero as the step began.

    A step makes b m + g of a moment m, so it makes g of zero: what is expected, without b times what was before.

    Args:
        after: The actual run's moment after the step.
        after_e, before_e: The expected run's after the step and before it.
        decays: By what the optimizer may multiply a moment in a step.
    """
    limit = RESIDUAL_EXACT * distance(after, after_e)
    if not limit or not before_e.sum_squares or after.numel < LEAST_MULTIPLES:
        return None
    if distance(after, before_e) <= limit:
        text = f"{state} is what it was before this step"
        return Explanation(Cause.STALE_WEIGHT, evidence={"state": state, "note": text})
    for decay in decays:
        if distance(after, after_e - before_e.scaled(decay)) <= limit:
            return Explanation(Cause.OPTIMIZER_STATE_LOST, evidence={"state": state})
    return None


def _decays(options: Mapping[str, object]) -> Iterator[float]:
    """Yield the options by which optimizers multiply a moment in a step."""
    for option in ("betas", "momentum", "alpha"):
        value = options.get(option, ())
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, (int, float)) and each:
                yield float(each)


def repeated_state(table: Table, run: Run, name: str, label: str) -> Explanation | None:
    """Return the cause where different shards of a TP group have states with the same bits, which are not zero.

    Args:
        label: The reading under which the parameter is compared.
    """
    for key, records in table.items():
        if key[0] != "state" or key[1] != name:
            continue
        for group in run.replicas:
            seen: dict[str, tuple[int, str]] = {}
            for rank in (rank for rank in group if rank in records):
                record, reading = records[rank], reading_of(records[rank], label)
                if reading is None or reading.sketch.numel < 2 or not reading.sketch.sum_squares:
                    continue
                first, piece = seen.setdefault(record.digest, (rank, reading.piece))
                if piece != reading.piece:
                    evidence = {"state": key[2], "state_of_rank": {str(rank): first}}
                    return Explanation(Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK, evidence=evidence)
    return None
