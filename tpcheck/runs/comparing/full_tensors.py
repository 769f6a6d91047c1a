"""Whole tensors that both traces kept (`tensors="full"`), as evidence for the causes that sketches cannot show.

The tensors of one TP group and one step become the `Evidence` that `tpcheck verify` gathers, and its checks and
hypotheses name the cause. Rows of activations are paired by the content of their samples.

S: samples, L: positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from statistics import mean

import torch

from tpcheck.backends.layout import Layout
from tpcheck.core.causes import Explanation
from tpcheck.core.placement import Shard
from tpcheck.core.topology import Topology
from tpcheck.numerics.checks.gradients import gradients_match_reference
from tpcheck.numerics.checks.outputs import outputs_match_reference
from tpcheck.numerics.checks.start import weights_match_reference
from tpcheck.numerics.checks.suspects import compare_parameters, parameter_suspect
from tpcheck.numerics.differences import frobenius_distance, rounding_error
from tpcheck.numerics.evidence import Evidence, Phase, Role, Step, Suspect, TensorKey
from tpcheck.numerics.global_index import GlobalIndex
from tpcheck.numerics.hypotheses import explain
from tpcheck.numerics.tolerance import SAFETY_FACTOR, Tolerance
from tpcheck.runs.comparing.alignment import AlignedStep
from tpcheck.runs.comparing.comparisons import Comparer, Comparison, Key, Table
from tpcheck.runs.comparing.full_causes import halves_read_in_another_order, statistic_without_backward
from tpcheck.runs.trace.records import PassRecord, Reading, TensorRecord
from tpcheck.runs.trace.wholes import Records, epsilon, reading_of

MOST_BYTES = 1 << 30
"""Beyond so many bytes of whole tensors, those of the module that contains the wrong one are read alone."""
MOST_BLOCKS = 4  # of a fused weight: Q, K and V; gate and up; all of them

_PLACES: Mapping[str, tuple[Phase, Role]] = {
    "input": ("forward", "input"),
    "output": ("forward", "output"),
    "output_gradient": ("backward", "output"),
}


@dataclass(frozen=True, slots=True)
class FullTensors:
    """What both runs kept of the start, or of a step.

    Attributes:
        comparer: Knows the runs, and how parameters are read.
        actual, expected: The tables of the step; of the start where `step` is None.
        actual_before, expected_before: Those with the weights before the step.
        step: Both runs' records of the step.
        scales: By what the losses of the two runs are multiplied.
        gathered: Evidence by the kind of the wrong tensor and the replica, once it was asked for.
    """

    comparer: Comparer
    actual: Table
    expected: Table
    actual_before: Table
    expected_before: Table
    step: AlignedStep | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    gathered: dict[tuple[str, int], Evidence] = field(default_factory=dict)

    def has(self, key: Key) -> bool:
        """Return whether both runs kept this tensor whole, on all ranks."""
        return is_full(self.actual.get(key, {})) and is_full(self.expected.get(key, {}))


def is_full(records: Records) -> bool:
    return bool(records) and all(record.full for record in records.values())


def explain_in_full(full: FullTensors, comparison: Comparison, comparisons: Sequence[Comparison]) -> Explanation | None:
    """Return the cause that the whole tensors of a wrong place show; None where there are none, or none fits.

    Args:
        comparison: The wrong tensor.
        comparisons: Everything that the check has compared, for what is allowed.
    """
    if not full.has(comparison.key) or comparison.is_of_norms:
        return None
    try:
        evidence = _evidence(full, comparison, comparisons)
        found = _of_runs(evidence, comparison)
        suspects = _suspects(evidence, comparison, full) if found is None else iter(())
        return found or next((found for suspect in suspects if (found := explain(suspect))), None)
    except (RuntimeError, ValueError, IndexError):
        return None  # in a trace from a stranger, tensors may have other shapes than their records say


def _evidence(full: FullTensors, comparison: Comparison, comparisons: Sequence[Comparison]) -> Evidence:
    builder = _Builder(full, comparison, comparisons)
    key = (comparison.kind, builder.dp_rank)
    evidence = full.gathered.get(key)
    if evidence is None:
        evidence = builder.evidence()
        if not builder.is_of_one_module:
            full.gathered[key] = evidence
    return evidence


def _of_runs(evidence: Evidence, comparison: Comparison) -> Explanation | None:
    """Return the causes that have no hypothesis of `verify`."""
    allowed = comparison.allowed or 0.0
    if comparison.kind == "output":
        return halves_read_in_another_order(evidence, allowed)
    if comparison.kind == "output_gradient":
        _, module, path, call = comparison.key
        return statistic_without_backward(evidence, TensorKey("backward", module, call, "output", path), allowed)
    return None


def _suspects(evidence: Evidence, comparison: Comparison, full: FullTensors) -> Iterator[Suspect]:
    """Yield the suspects of the check that are about the wrong tensor."""
    if comparison.kind == "output":
        for suspect in outputs_match_reference(evidence, 0).suspects[:1]:
            if _is_near(suspect, comparison):
                yield suspect
    elif comparison.kind == "output_gradient":
        suspects = gradients_match_reference(evidence, 0).suspects
        yield from (each for each in suspects[:1] if "parameter" not in each.where and _is_near(each, comparison))
    elif comparison.kind == "gradient":
        suspects = gradients_match_reference(evidence, 0).suspects
        yield from (each for each in suspects if each.where.get("parameter") == comparison.name)
    elif comparison.kind == "weight" and full.step is None:
        suspects = weights_match_reference(evidence).suspects
        yield from (each for each in suspects if each.where["parameter"] == comparison.name)
    elif comparison.kind == "weight":
        yield from _updated(evidence, comparison)


def _is_near(suspect: Suspect, comparison: Comparison) -> bool:
    """Return whether the first wrong tensor is of this module, or of what goes on around it before it returns."""
    module, name = str(suspect.where.get("module", "")), comparison.name
    return module == name or not module or name.startswith(f"{module}.") or module.startswith(f"{name}.") or not name


def _updated(evidence: Evidence, comparison: Comparison) -> Iterator[Suspect]:
    name = comparison.name
    compared, _ = compare_parameters(
        evidence,
        {name: evidence.reference[0].weights[name]} if name in evidence.reference[0].weights else {},
        [rank.weights for rank in evidence.candidate[0]],
        lambda name, expected: comparison.allowed or 0.0,
    )
    where = {"phase": "update", "step": 0}
    for parameter in compared.values():
        yield parameter_suspect(
            evidence, parameter, check="updates_match_reference", kind="update", where=where, details={}
        )


class _Builder:
    """Makes the evidence of one TP group of the actual run."""

    def __init__(self, full: FullTensors, comparison: Comparison, comparisons: Sequence[Comparison]) -> None:
        self._full = full
        self._allowed = {each.key: each for each in (*comparisons, comparison)}
        self._scope = _scope(full, comparison)
        actual, expected = full.comparer.actual, full.comparer.expected
        shared = full.step.shared if full.step is not None else None
        replicas = shared.actual if shared is not None else tuple(range(actual.dp))
        wrong = set(comparison.wrong_ranks())
        self.dp_rank = next((each for each in replicas if wrong & set(actual.replicas[each])), replicas[0])
        self._group = actual.replicas[self.dp_rank]
        self._groups_e = [expected.replicas[each] for each in (shared.expected if shared else range(expected.dp))]
        self._num_replicas = len(replicas)
        self._has_activations = comparison.kind != "weight"

    @property
    def is_of_one_module(self) -> bool:
        return bool(self._scope)

    def evidence(self) -> Evidence:
        full = self._full
        layouts = self._layouts()
        before_e, before = self._parameters(full.expected_before, full.actual_before, "weight", layouts)
        step, ranks = Step({}, {}, {}, None, 0.0), [Step({}, {}, {}, None, 0.0) for _ in self._group]
        if full.step is not None:
            weights_e, weights = self._parameters(full.expected, full.actual, "weight", layouts)
            gradients_e, gradients = self._parameters(full.expected, full.actual, "gradient", layouts)
            activations_e, activations = self._activations() if self._has_activations else ({}, [{} for _ in ranks])
            loss_e, losses = self._losses()
            step = Step(activations_e, gradients_e, weights_e, None, loss_e)
            ranks = [
                Step(activations[number], gradients[number], weights[number], None, losses[number])
                for number in range(len(self._group))
            ]
        dtypes = [each.dtype for run in (full.comparer.actual, full.comparer.expected) for each in [run.first]]
        dtype = max(dtypes, key=epsilon)
        return Evidence(
            topology=Topology(tp=len(self._group), dp=full.comparer.actual.dp),
            dp_rank=self.dp_rank,
            dtype=dtype,
            initial=before_e,
            initial_parts=before,
            layouts=layouts,
            reference=(step,),
            candidate=(tuple(ranks),),
            buffers=(),
            facts=(),
            tolerance=self._tolerance(step, dtype),
        )

    # ---- parameters

    def _layouts(self) -> dict[str, Layout]:
        """Return how parameters lie over the TP group: what the shapes allow and the ranks' pieces confirm."""
        layouts = {}
        for key, records in self._full.actual_before.items():
            label = self._full.comparer.readings.get(key[1], ("", ""))[0]
            if key[0] == "weight" and self._is_wanted(key) and label:
                layout = _layout([records.get(rank) for rank in self._group], label)
                if layout is not None and key[1] in self._full.comparer.permuted:
                    layout = self._fused(key, layout) or layout
                if layout is not None:
                    layouts[key[1]] = layout
        return layouts

    def _fused(self, key: Key, layout: Layout) -> Layout | None:
        """Return the layout in blocks under which a fused weight is the expected one."""
        wholes, parts = self._parameters(self._full.expected_before, self._full.actual_before, key[0], {key[1]: layout})
        placement = layout.placement()
        if key[1] not in wholes or not isinstance(placement, Shard):
            return None
        expected, local = wholes[key[1]], [of_rank[key[1]] for of_rank in parts]
        right = rounding_error(expected) * SAFETY_FACTOR
        for candidate in _in_blocks(layout.shape, placement.dim, len(local)):
            fused = Layout.from_placement(layout.shape, candidate, len(local))
            if frobenius_distance(fused.assemble(local), expected) <= right:
                return fused
        return None

    def _parameters(
        self, table_e: Table, table_a: Table, kind: str, layouts: Mapping[str, Layout]
    ) -> tuple[dict[str, torch.Tensor], tuple[dict[str, torch.Tensor], ...]]:
        """Return the expected whole tensors of a kind by parameter, and those of each rank of the group."""
        wholes: dict[str, torch.Tensor] = {}
        parts: tuple[dict[str, torch.Tensor], ...] = tuple({} for _ in self._group)
        for name, layout in layouts.items():
            key = (kind, name, "", 0)
            records_e, records_a = table_e.get(key, {}), table_a.get(key, {})
            if not (is_full(records_e) and is_full(records_a)):
                continue
            group = self._groups_e[0]
            layout_e = _layout(
                [records_e.get(rank) for rank in group], self._full.comparer.readings.get(name, ("", ""))[1]
            )
            local = [records_a.get(rank) for rank in self._group]
            if layout_e is None or layout_e.shape != layout.shape or None in local:
                continue
            whole = layout_e.assemble([records_e[rank].full[0] for rank in group])
            held = [record.full[0] for record in local if record is not None]
            wholes[name] = whole.to(held[0].dtype)  # where the dtypes differ, weights are compared by bits, rounded
            for of_rank, part in zip(parts, held, strict=True):
                of_rank[name] = part
        return wholes, parts

    # ---- activations

    def _activations(
        self,
    ) -> tuple[dict[TensorKey, torch.Tensor], Sequence[dict[TensorKey, torch.Tensor]]]:
        step, full = self._full.step, self._full
        assert step is not None
        wholes: dict[TensorKey, torch.Tensor] = {}
        parts: tuple[dict[TensorKey, torch.Tensor], ...] = tuple({} for _ in self._group)
        shared = step.shared
        is_counted_once = shared is None or (shared.actual_copies, shared.expected_copies) == (1, 1)
        for key, records_e in full.expected.items():
            place, records_a = _PLACES.get(key[0]), full.actual.get(key, {})
            is_known = self._is_wanted(key) and is_full(records_e) and is_full(records_a)
            if place is None or not is_known or not (is_counted_once or place[0] == "forward"):
                continue
            found = self._rows(key, records_a, records_e)
            if found is None:
                continue
            whole, of_ranks = found
            if place[0] == "backward":
                # As in `Evidence`: of the mean over the samples of this replica, of losses that are not scaled.
                whole = whole * (self._num_replicas / len(self._groups_e) / full.scales[1])
                of_ranks = [part / full.scales[0] for part in of_ranks]
            tensor_key = TensorKey(place[0], key[1], key[3], place[1], key[2])
            wholes[tensor_key] = whole
            for of_rank, part in zip(parts, of_ranks, strict=True):
                of_rank[tensor_key] = part
        return wholes, parts

    def _rows(self, key: Key, records_a: Records, records_e: Records) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Return the expected whole, and each rank's part, with the rows of this replica's samples in one order."""
        step = self._full.step
        assert step is not None
        by_rank = [_samples(records_a.get(rank), step.actual[rank].passes) for rank in self._group]
        by_group = [
            [_samples(records_e.get(rank), step.expected[rank].passes) for rank in group] for group in self._groups_e
        ]
        reading = self._expected_reading(key, records_e)
        if reading is None or None in by_rank or any(None in each for each in by_group):
            return None
        names = list(by_rank[0] or {})
        wholes: dict[str, torch.Tensor] = {}
        for group, samples in zip(self._groups_e, by_group, strict=True):
            for name in samples[0] or {}:
                pieces = [of_rank[name] for of_rank in samples if of_rank is not None and name in of_rank]
                whole = _put_together(pieces, reading) if len(pieces) == len(group) else None
                if whole is not None:
                    wholes.setdefault(name, whole)
        if not names or not {*names} <= {*wholes} or any({*(each or {})} != {*names} for each in by_rank):
            return None
        of_ranks = [[of_rank[name] for name in names] for of_rank in by_rank if of_rank is not None]
        if any(len({part.shape for part in parts}) > 1 for parts in of_ranks):
            return None
        stacked = [torch.stack(parts) if names != [_WHOLE] else parts[0] for parts in of_ranks]
        expected = [wholes[name] for name in names]
        if len({each.shape for each in expected}) > 1:
            return None
        first = records_a[self._group[0]].readings
        if first and first[0].is_term:  # a `Partial` DTensor: what the ranks hold together
            stacked = [torch.stack(stacked).sum(0)] * len(stacked)
        return (torch.stack(expected) if names != [_WHOLE] else expected[0]), stacked

    def _expected_reading(self, key: Key, records: Records) -> Reading | None:
        """Return how the expected run's parts are read: as they were compared; of inputs as equal ranks show."""
        first = records[self._groups_e[0][0]]
        known = self._allowed.get(key)
        if known is not None:
            return reading_of(first, known.expected.label)
        are_equal = all(len({records[rank].digest for rank in group}) == 1 for group in self._groups_e)
        return next(iter(first.readings[:1] if are_equal else first.readings[1:] or first.readings), None)

    def _losses(self) -> tuple[float, list[float]]:
        """Return the mean losses over the calls; zeros where a run has none, or other calls."""
        step = self._full.step
        assert step is not None
        of_ranks = [[call.loss for call in step.actual[rank].passes] for rank in self._group]
        of_groups = [[call.loss for call in step.expected[group[0]].passes] for group in self._groups_e]
        numbers = [loss for losses in (*of_ranks, *of_groups) for loss in losses]
        num_calls = {len(losses) for losses in (*of_ranks, *of_groups)}
        is_same_batch = self._num_replicas == len(self._groups_e) == len(num_calls) == 1
        if not numbers or None in numbers or not is_same_batch:
            return 0.0, [0.0] * len(self._group)
        return _mean(of_groups[0]), [_mean(losses) for losses in of_ranks]

    # ---- what is allowed

    def _tolerance(self, step: Step, dtype: str) -> Tolerance:
        deviations: dict[object, float] = {}
        relative = [each.relative_allowed for each in self._allowed.values() if each.kind == "output" and each.allowed]
        typical = max(relative, default=0.0) / SAFETY_FACTOR
        for key, tensor in step.activations.items():
            kind = next(kind for kind, place in _PLACES.items() if place == (key.phase, key.role))
            known = self._allowed.get((kind, key.module, key.path, key.call))
            if known is not None and known.allowed is not None:
                share = self._num_replicas if key.phase == "backward" else 1.0
                deviations[0, self.dp_rank, key] = known.allowed * share / SAFETY_FACTOR
                if key.module == "" and tensor.dim() == 0:
                    deviations[0, self.dp_rank, "loss"] = known.allowed / SAFETY_FACTOR
            else:
                deviations[0, self.dp_rank, key] = typical * float(torch.linalg.vector_norm(tensor.double()))
        for each in self._allowed.values():
            if each.kind in ("gradient", "weight") and each.allowed is not None:
                deviations[0, each.kind, each.name] = each.allowed / SAFETY_FACTOR
        return Tolerance(epsilon(dtype), 1, deviations)

    def _is_wanted(self, key: Key) -> bool:
        module = key[1].rpartition(".")[0] if key[0] in ("weight", "gradient") else key[1]
        return not self._scope or module == self._scope or module.startswith(f"{self._scope}.")


def _mean(losses: Sequence[float | None]) -> float:
    return mean(loss for loss in losses if loss is not None)


def _scope(full: FullTensors, comparison: Comparison) -> str:
    """Return the module whose tensors are read: all, or the one around the wrong tensor where they are large."""
    sizes = [
        prod(record.shape) * 8
        for table in (full.actual, full.expected)
        for records in table.values()
        for record in records.values()
        if record.full
    ]
    if sum(sizes) <= MOST_BYTES:
        return ""
    module = comparison.name.rpartition(".")[0]
    return module.rpartition(".")[0] or module


def _layout(records: Sequence[TensorRecord | None], label: str) -> Layout | None:
    """Return how the ranks' parts lie in the whole; None where none of the usual cuts is that of the ranks' pieces."""
    readings = [None if record is None else reading_of(record, label) for record in records]
    shapes = [() if record is None else record.shape for record in records]
    pieces = [reading.piece for reading in readings if reading is not None]
    first = readings[0] if readings else None
    if first is None or len(pieces) < len(records):
        return None
    whole, tp = first.shape, len(records)
    if all(shape == whole for shape in shapes):
        return Layout.replicated(whole, tp)
    cut = [dim for dim in range(len(whole)) if any(len(s) != len(whole) or s[dim] != whole[dim] for s in shapes)]
    if len(cut) != 1 or sum(shape[cut[0]] for shape in shapes) != whole[cut[0]]:
        return None
    dim, sizes = cut[0], tuple(shape[cut[0]] for shape in shapes)
    for placement in (Shard(dim, sizes=(sizes,)), *_in_blocks(whole, dim, tp)):
        if [GlobalIndex.shard(whole, placement, tp, rank).piece() for rank in range(tp)] == pieces:
            return Layout.from_placement(whole, placement, tp)
    return None


def _in_blocks(shape: Sequence[int], dim: int, tp: int) -> list[Shard]:
    return [Shard(dim, blocks) for blocks in range(2, MOST_BLOCKS + 1) if shape[dim] % (blocks * tp) == 0]


_WHOLE = ""  # names the one tensor of a call without samples


def _samples(record: TensorRecord | None, passes: Sequence[PassRecord]) -> dict[str, torch.Tensor] | None:
    """Return the part of each sample, [L, ...] or [...], by its digest; None where rows are not those of samples."""
    calls = [each for each in passes if each.has_backward]
    if record is None or len(record.full) != len(calls):
        return None
    if not record.readings or -1 not in record.readings[0].shape:
        return {_WHOLE: record.full[0]} if len(calls) == 1 else None
    found: dict[str, torch.Tensor] = {}
    for tensor, call in zip(record.full, calls, strict=True):
        number = len(call.samples)
        if not number or not tensor.dim():
            return None
        num_row_dims = sum(size == -1 for size in record.readings[0].shape)
        if num_row_dims == 1 and len(tensor) != number:
            tensor = tensor.reshape(number, -1, *tensor.shape[1:]) if len(tensor) % number == 0 else tensor
        elif num_row_dims > 1 and len(tensor) != number:
            tensor = tensor.transpose(0, 1)
        if len(tensor) != number:
            return None
        for name, rows in zip(call.samples, tensor, strict=True):
            found.setdefault(name, rows)
    return found


def _put_together(parts: Sequence[torch.Tensor], reading: Reading) -> torch.Tensor | None:
    """Return one sample's part of the whole from those of the ranks of a TP group; None where the cut is unknown."""
    if len(parts) == 1:
        return parts[0]
    if reading.is_term:
        return torch.stack(list(parts)).sum(0)
    if reading.label == "sequence":
        return torch.cat(list(parts), 0)
    columns = tuple(size for size in reading.shape if size != -1)
    local = tuple(parts[0].shape)[parts[0].dim() - len(columns) :]
    cut = [dim for dim in range(1, len(columns) + 1) if columns[-dim] != local[-dim]]
    if not cut:
        return parts[0]
    whole = torch.cat(list(parts), -cut[0])
    return whole if len(cut) == 1 and whole.shape[-cut[0]] == columns[-cut[0]] else None
