"""Tensors of one step that both runs have, with their error and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import hypot, inf, isfinite, isnan, prod, sqrt
from typing import Literal

import torch

from tpcheck.core.name_maps import NameMap
from tpcheck.numerics.sketch import distance
from tpcheck.numerics.tolerance import SAFETY_FACTOR
from tpcheck.runs.comparing.alignment import Run, SharedSamples
from tpcheck.runs.trace.records import TensorRecord
from tpcheck.runs.trace.wholes import (
    Pairing,
    Records,
    Whole,
    computed,
    epsilon,
    labels,
    num_computed,
    num_stored,
    pair_readings,
    stored,
)

Key = tuple[str, str, str, int]  # kind, name, part, call: as `TensorRecord.key`, renamed
Table = Mapping[Key, Records]

ACTIVATIONS = ("output", "output_gradient")
Moment = Literal["start", "step"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor of both runs.

    Attributes:
        key: Kind, name, part and call.
        actual, expected: What the ranks have, put together.
        errors: Frobenius distance of each variant of the actual tensor from the expected one.
        allowed: Largest error that passes; None where no replay measured it.
        terms_error: Distance of the sum over TP ranks, where the ranks' parts may be terms; None where they may not.
        is_of_norms: The norms alone are compared.
        order: Place in the order of events.
        deviation: By which rounding moves the tensor; None where no replay measured it.
    """

    key: Key
    actual: Whole
    expected: Whole
    errors: tuple[float, ...]
    allowed: float | None
    terms_error: float | None = None
    is_of_norms: bool = False
    order: int = 0
    deviation: float | None = None

    @property
    def kind(self) -> str:
        return self.key[0]

    @property
    def name(self) -> str:
        return self.key[1]

    @property
    def part(self) -> str:
        return self.key[2]

    @property
    def label(self) -> str:
        """The tensor's name for tables and coverage."""
        kind, name, part, call = self.key
        what = {"weight": "", "gradient": "gradient of ", "output_gradient": "gradient of output of "}
        text = what.get(kind, f"{kind} of ") + (name or "the model")
        return text + (f" {part}" if part else "") + (f", call {call}" if call else "")

    @property
    def error(self) -> float:
        """The worst replica's; that of the sum where the parts are terms of a sum that is reduced later."""
        if self.is_reduced_later:
            assert self.terms_error is not None
            return self.terms_error
        return max(self.errors)

    @property
    def is_reduced_later(self) -> bool:
        """Whether the parts are no replicas, but their sum over the TP ranks is the expected tensor."""
        if self.terms_error is None:
            return False
        allowed = self.allowed or 0.0
        return max(self.errors) > allowed and self.terms_error <= allowed

    @property
    def is_judged(self) -> bool:
        return self.allowed is not None or self.error == 0

    @property
    def is_wrong(self) -> bool:
        return self.allowed is not None and self.error > self.allowed

    @property
    def margin(self) -> float:
        return margin(self.error, self.allowed or 0.0)

    @property
    def relative(self) -> float:
        """Error relative to the expected tensor; absolute where that is zero."""
        return relative(self.error, self.expected.norm)

    @property
    def relative_allowed(self) -> float:
        return relative(self.allowed or 0.0, self.expected.norm)

    def wrong_ranks(self) -> tuple[int, ...]:
        """Return the ranks whose part is wrong; all of them where that is unknown."""
        allowed = self.allowed or 0.0
        ranks = [
            rank
            for variant, error in zip(self.actual.variants, self.errors, strict=True)
            if error > allowed
            for rank in variant.ranks
        ]
        if ranks and not self.is_of_norms and any(part.is_slice for part in self.actual.parts.values()):
            return self._ranks_of_wrong_slices(allowed) or tuple(sorted(ranks))
        if not ranks or len(self.actual.pieces) == 1 or self.is_of_norms:
            return tuple(sorted(ranks or self.actual.ranks))
        by_piece = self._wrong_pieces(allowed)
        return tuple(sorted(rank for rank in ranks if self.actual.parts[rank].piece in by_piece)) or tuple(
            sorted(ranks)
        )

    def _ranks_of_wrong_slices(self, allowed: float) -> tuple[int, ...]:
        """Return the ranks in whose tiles the error lies: those in which only ranks with the same slice have any."""
        gap = (self.actual.sketch - self.expected.sketch).tile_norms()
        held = {rank: part.sketch.tile_norms() != 0 for rank, part in self.actual.parts.items()}
        wrong = []
        for rank, tiles in held.items():
            alone = tiles.clone()
            for of_other in held.values():
                if not torch.equal(of_other, tiles):
                    alone &= ~of_other
            if float((gap[alone] ** 2).sum()) ** 0.5 > allowed:
                wrong.append(rank)
        return tuple(sorted(wrong))

    def _wrong_pieces(self, allowed: float) -> set[str]:
        """Return the pieces in whose tiles the error lies: those that hold elements there, where others hold none."""
        gap = (self.actual.sketch - self.expected.sketch).tile_norms()
        held = {
            piece: self.actual.parts[ranks[0]].sketch.tile_norms() != 0 for piece, ranks in self.actual.pieces.items()
        }
        wrong = set()
        for piece, tiles in held.items():
            others = [other for name, other in held.items() if name != piece]
            alone = tiles.clone()
            for other in others:
                alone &= ~other
            if not bool(alone.any()) or float((gap[alone] ** 2).sum()) ** 0.5 > allowed:
                wrong.add(piece)
        return wrong


def margin(error: float, allowed: float) -> float:
    """Return the error divided by the allowed one; 0 where both are 0."""
    if error == 0:
        return 0.0
    return error / allowed if allowed else inf


def relative(error: float, norm: float) -> float:
    """Return the error relative to a norm; absolute where that is zero or not finite."""
    return error / norm if norm and isfinite(norm) else error


def larger_deviation(actual: Whole, expected: Whole, eps: tuple[float, float] = (0.0, 0.0)) -> float | None:
    """Return the larger of the deviations; where one run computes in a lower dtype, its own, or None.

    Args:
        eps: Machine epsilons of the lowest dtypes that the two runs compute in.
    """
    eps_a, eps_e = max(eps[0], epsilon(actual.dtype)), max(eps[1], epsilon(expected.dtype))
    if eps_a != eps_e:
        return actual.deviation if eps_a > eps_e else expected.deviation
    known = [whole.deviation for whole in (actual, expected) if whole.deviation is not None]
    return max(known, default=None)


def sketch_rounding(whole: Whole) -> float:
    """Return the rounding error of the sums that make a sketch.

    A tile's sum of n terms rounds by eps * |x| * n / sqrt(24), where x is a typical element and the partial sums are
    those of random signs: the norm of all tiles times eps * sqrt(n / 24). Tensors below float64 are summed in float32,
    those on the CPU so that it does not grow with n (`FLOAT32_ROUNDING`, which is below eps).
    """
    eps = epsilon("float64" if whole.dtype == "float64" else "float32")
    tiles = whole.sketch.tiles[0].numel()
    return whole.norm * eps * sqrt(1 + whole.sketch.numel / tiles / 24)


def rounding(whole: Whole, *, is_stored: bool, eps: float) -> float:
    """Return the error that rounding alone makes: of every element of a computed tensor, of one of a stored one.

    The largest element of a stored tensor is taken as four times a typical one, which holds for normal ones.
    """
    numel = max(1, whole.sketch.numel)
    share = 2.0 if numel == 1 else 4 / sqrt(numel) if is_stored else 1 / sqrt(3)
    return whole.norm * eps * share if isfinite(whole.norm) else 0.0


def allowed_error(
    actual: Whole, expected: Whole, deviation: float | None, *, is_stored: bool, scale: float = 1.0
) -> float | None:
    """Return the largest error that passes; None where no replay measured what rounding does.

    Args:
        deviation: By which rounding moves the tensor.
        scale: By how much further than in the replays the runs were apart before the step.
    """
    if deviation is None:
        return None
    eps = max(epsilon(actual.dtype), epsilon(expected.dtype))
    own = rounding(expected, is_stored=is_stored, eps=eps)
    return SAFETY_FACTOR * max(scale * deviation, own, sketch_rounding(expected))


def allowed_without_replays(actual: Whole, expected: Whole) -> float:
    """Return the error that passes between two sketches of the same numbers, cut in other ways.

    Where the dtypes differ, the numbers were rounded to the lower one.
    """
    eps_a, eps_e = epsilon(actual.dtype), epsilon(expected.dtype)
    cast = rounding(expected, is_stored=False, eps=max(eps_a, eps_e)) if eps_a != eps_e else 0.0
    return SAFETY_FACTOR * max(cast, sketch_rounding(expected))


@dataclass(slots=True)
class Comparer:
    """Compares the tensors of two runs.

    Attributes:
        actual, expected: The runs.
        names: How names of one run become those of the other.
        readings: Labels under which each parameter's weights agreed before the first step.
        permuted: Parameters whose elements seem to lie in another order over the ranks than their shapes suggest, as
            those of fused layers: their norms alone are compared.
        rerouted: Modules that send tokens elsewhere than in the other run in the step that is compared.
        not_compared: Why a tensor was not compared, by label.
        given: How far biases were apart before the first step, which is given where the recordings begin in the middle
            of a training.
        doubtful: Losses that agree neither as means nor as sums over the calls, of runs with other numbers of calls: a
            mistake only where gradients are wrong, too.
        eps: Machine epsilons of the lowest dtypes that the two runs compute in, in the step that is compared.
    """

    actual: Run
    expected: Run
    names: NameMap
    readings: dict[str, tuple[str, str]] = field(default_factory=dict)
    permuted: set[str] = field(default_factory=set)
    rerouted: set[str] = field(default_factory=set)
    not_compared: dict[str, str] = field(default_factory=dict)
    given: dict[str, float] = field(default_factory=dict)
    doubtful: list[Comparison] = field(default_factory=list)
    eps: tuple[float, float] = (0.0, 0.0)

    def table(self, run: Run, records_by_rank: Mapping[int, Sequence[TensorRecord]]) -> Table:
        """Return the records of all ranks by key, in the order of events."""
        is_actual = run is self.actual
        table: dict[Key, dict[int, TensorRecord]] = {}
        for rank, records in records_by_rank.items():
            for record in records:
                name = self.names.renamed(record.name, is_actual=is_actual)
                table.setdefault((record.kind, name, record.part, record.call), {})[rank] = record
        return table

    def pairs(self, actual: Table, expected: Table, kinds: Sequence[str]) -> Iterator[tuple[Key, Records, Records]]:
        """Yield what both runs have of these kinds, in the order of events; note what one alone has."""
        unmatched = dict.fromkeys(key for key in expected if key[0] in kinds)
        for key in [key for key in actual if key[0] in kinds]:
            key_e = key if key in expected else self._only_one_like(key, actual, expected)
            if key_e is None:
                self._note(key, "only the actual run has it")
                continue
            unmatched.pop(key_e, None)
            yield key, actual[key], expected[key_e]
        for key in unmatched:
            self._note(key, "only the expected run has it")

    @staticmethod
    def _only_one_like(key: Key, actual: Table, expected: Table) -> Key | None:
        """Return the one output of the same call where frameworks name it otherwise (`0`, `logits`)."""
        kind, name, _, call = key
        if kind not in ACTIVATIONS:
            return None

        def of_call(table: Table) -> list[Key]:
            return [each for each in table if (each[0], each[1], each[3]) == (kind, name, call)]

        candidates = of_call(expected)
        return candidates[0] if len(candidates) == 1 and len(of_call(actual)) == 1 else None

    def _note(self, key: Key, reason: str) -> None:
        self.not_compared[label_of(key)] = reason

    def stored(self, actual: Table, expected: Table, kinds: Sequence[str], *, scale: float = 1.0) -> list[Comparison]:
        """Compare tensors of parameters: gradients, weights, states."""
        compared = []
        for order, (key, records_a, records_e) in enumerate(self.pairs(actual, expected, kinds)):
            found = pair_readings(
                records_a,
                records_e,
                self.expected.replicas,
                numbers=(num_stored, num_stored),
                preferred=self.readings.get(key[1]),
            )
            if not found.actual:
                self._note(key, found.reason)
                continue
            whole_a = stored(records_a, found.actual, self.actual.replicas)
            whole_e = stored(records_e, found.expected, self.expected.replicas)
            deviation = larger_deviation(whole_a, whole_e, self.eps)
            allowed = allowed_error(whole_a, whole_e, deviation, is_stored=key[0] != "gradient", scale=scale)
            if allowed is not None and key[0] == "weight":
                allowed += self.given.get(key[1], 0.0)
            comparison = compare(key, whole_a, whole_e, allowed, order, deviation)
            compared.append(of_norms(comparison) if key[1] in self.permuted else comparison)
        compared += self._fused(actual, expected, kinds, len(compared))
        return compared

    def initial(self, actual: Table, expected: Table, kinds: Sequence[str]) -> list[Comparison]:
        """Compare weights before the first step, and choose under which readings each parameter is compared."""
        compared = []
        for order, (key, records_a, records_e) in enumerate(self.pairs(actual, expected, kinds)):
            alternatives = [
                (a, e)
                for a, shape_a in labels(records_a)
                for e, shape_e in labels(records_e)
                if shape_a == shape_e and num_stored(records_a, a) == num_stored(records_e, e)
            ]
            found = pair_readings(records_a, records_e, self.expected.replicas, numbers=(num_stored, num_stored))
            if not found.actual:
                self._note(key, found.reason)
                continue
            best = self._compare_initial(key, records_a, records_e, found, order)
            sharded = [pair for pair in alternatives if "dim" in pair[0] and "dim" in pair[1]]
            for labels_of_both in sharded:  # shapes allow several dims: the one under which the weights agree
                if best.is_wrong and "dim" in found.actual:
                    other = self._compare_initial(key, records_a, records_e, Pairing(*labels_of_both), order)
                    best = best if other.is_wrong else other
            self.readings[key[1]] = (best.actual.label, best.expected.label)
            compared.append(best)
        return compared

    def _compare_initial(
        self, key: Key, records_a: Records, records_e: Records, pairing: Pairing, order: int
    ) -> Comparison:
        whole_a = stored(records_a, pairing.actual, self.actual.replicas)
        whole_e = stored(records_e, pairing.expected, self.expected.replicas)
        return compare(key, whole_a, whole_e, allowed_without_replays(whole_a, whole_e), order)

    def _fused(self, actual: Table, expected: Table, kinds: Sequence[str], order: int) -> Iterator[Comparison]:
        """Yield the norms of parameters that one run has fused and the other in parts; nothing else of them adds up."""
        for is_actual, table, other in ((True, actual, expected), (False, expected, actual)):
            for key, records in table.items():
                parts = self.names.fused_from(key[1]) if key[0] in kinds and key not in other else ()
                keys = [(key[0], part, *key[2:]) for part in parts]
                if not keys or not all(each in other for each in keys):
                    continue
                run, other_run = (self.actual, self.expected) if is_actual else (self.expected, self.actual)
                fused = _first_stored(records, run)
                parts_of = [_first_stored(other[each], other_run) for each in keys]
                if fused is None or any(part is None for part in parts_of):
                    continue
                known = [part for part in parts_of if part is not None]
                norm = hypot(*(part.norm for part in known))
                pairs = [
                    allowed_error(fused, part, larger_deviation(fused, part, self.eps), is_stored=True)
                    for part in known
                ]
                allowed = hypot(*(pair for pair in pairs if pair is not None)) if None not in pairs else None
                for name in (label_of(each) for each in (key, *keys)):
                    self.not_compared.pop(name, None)
                self.not_compared[f"elements of {label_of(key)}"] = (
                    "one run has it fused, the other in parts: only norms were compared"
                )
                sides = (fused, known[0]) if is_actual else (known[0], fused)
                yield Comparison(key, *sides, (abs(fused.norm - norm),), allowed, is_of_norms=True, order=order)

    def computed(
        self,
        actual: Table,
        expected: Table,
        kind: str,
        shared: SharedSamples,
        scales: tuple[float, float],
        scale: float,
        num_calls: tuple[int, int],
        adds_up: tuple[int, int] = (1, 1),
    ) -> list[Comparison]:
        """Compare outputs of modules, or their gradients.

        What has no rows of samples, such as a loss, is a mean or a sum over the calls of a step, which nothing tells:
        it is compared where both runs made as many.

        Args:
            shared: The replicas that both runs gave the same samples.
            scales: The loss scales of the two runs.
            scale: By how much further than in the replays the runs were apart before the step.
            num_calls: How often the models of both runs were called in the step, by all of these replicas.
            adds_up: For each run 1 where its loss is the mean over all replicas, else the number of those over whose
                losses it is the sum: slices of sequences, or all replicas.
        """
        groups_a = [self.actual.replicas[replica] for replica in shared.actual]
        groups_e = [self.expected.replicas[replica] for replica in shared.expected]
        copies_a, copies_e = shared.actual_copies, shared.expected_copies
        compared = []
        for order, (key, all_a, all_e) in enumerate(self.pairs(actual, expected, (kind,))):
            records_a, records_e = _of_groups(all_a, groups_a), _of_groups(all_e, groups_e)
            if len(records_a) < sum(map(len, groups_a)) or len(records_e) < sum(map(len, groups_e)):
                self._note(key, "not all ranks of a run have it")
                continue

            def count(records: Records, label: str, groups: Sequence[Sequence[int]], factor: int) -> int:
                return num_computed(records, label, groups) * factor

            found = pair_readings(
                records_a,
                records_e,
                groups_e,
                numbers=(
                    partial(count, groups=groups_a, factor=copies_e),
                    partial(count, groups=groups_e, factor=copies_a),
                ),
            )
            if not found.actual:
                self._note(key, found.reason)
                continue
            whole_shape = dict(labels(records_a))[found.actual]
            is_keyed = -1 in whole_shape
            is_doubtful = not is_keyed and num_calls[0] != num_calls[1]
            if is_doubtful:
                self._note(key, "it has no rows of samples, and the models were called another number of times")
                if kind != "output" or whole_shape:
                    continue
            factors = _factors(kind, is_keyed, shared, scales, found, adds_up)
            copies = (copies_a, copies_e) if is_keyed else (len(groups_a), len(groups_e))
            comparisons = []
            for factor_a, factor_e in factors:
                whole_a = computed(records_a, found.actual, groups_a, factor_a, copies[0])
                whole_e = computed(records_e, found.expected, groups_e, factor_e, copies[1])
                deviation = larger_deviation(whole_a, whole_e, self.eps)
                allowed = allowed_error(whole_a, whole_e, deviation, is_stored=False, scale=scale)
                with_bias = None if allowed is None else allowed + self._moved_by_bias(key, whole_e)
                comparisons.append(compare(key, whole_a, whole_e, with_bias, order, deviation))
            comparison = min(comparisons, key=lambda each: each.relative)
            if not is_doubtful:
                compared.append(comparison)
            elif comparison.is_wrong and not _are_sums(comparison, num_calls):
                self.doubtful.append(comparison)
        return compared

    def _moved_by_bias(self, key: Key, output: Whole) -> float:
        """Return how far an output is moved in all of its rows by a bias that is given to be another one."""
        gap = self.given.get(f"{key[1]}.bias", 0.0) if key[0] == "output" and -1 in output.shape else 0.0
        width = prod(size for size in output.shape if size != -1)
        return gap * sqrt(output.sketch.numel / width / output.copies) if gap and width else 0.0


def _factors(
    kind: str,
    is_keyed: bool,
    shared: SharedSamples,
    scales: tuple[float, float],
    found: Pairing,
    adds_up: tuple[int, int],
) -> list[tuple[float, float]]:
    """Return by what the sums over TP groups of the two runs are multiplied; a scalar may be of two kinds.

    Rows of samples that are there more than once count once. A replica's loss is the mean over its samples, so
    gradients are divided by the number of replicas, whose gradients are averaged; so are outputs without rows.
    Where losses add up instead (`adds_up`), a scalar is a loss that does, or one that does not. Of slices, what has
    a row for each position adds up.
    """
    if kind == "output" and is_keyed:
        return [(1 / shared.actual_copies, 1 / shared.expected_copies)]
    loss_scales = scales if kind == "output_gradient" else (1.0, 1.0)
    sides = []
    for replicas, num_slices, loss_scale, num_added, label in (
        (shared.actual, shared.actual_cp, loss_scales[0], adds_up[0], found.actual),
        (shared.expected, shared.expected_cp, loss_scales[1], adds_up[1], found.expected),
    ):
        mean = 1 / len(replicas) / loss_scale
        if kind == "output" and label == "positions":
            sides.append([mean * num_slices])
        elif is_keyed or label == "positions":
            sides.append([mean * num_added])
        else:
            sides.append(list(dict.fromkeys((mean, mean * num_added))))
    return [(factor_a, factor_e) for factor_a, factor_e in product(*sides)]


def among_rerouted(comparer: Comparer, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the tensors of parameters in modules that send tokens elsewhere than in the other run."""
    return [each for each in comparisons if any(each.name.startswith(f"{module}.") for module in comparer.rerouted)]


def of_norms(comparison: Comparison) -> Comparison:
    """Return the comparison of the norms alone, of a tensor whose elements lie in an unknown order."""
    actual, expected = comparison.actual, comparison.expected
    return replace(comparison, errors=(abs(actual.norm - expected.norm),), is_of_norms=True)


def _are_sums(comparison: Comparison, num_calls: tuple[int, int]) -> bool:
    """Return whether numbers that differ as means over the calls agree as sums."""
    actual, expected = comparison.actual.sketch.scaled(num_calls[0]), comparison.expected.sketch.scaled(num_calls[1])
    return distance(actual, expected) <= (comparison.allowed or 0.0) * num_calls[1]


def label_of(key: Key) -> str:
    """Return a tensor's name for coverage."""
    kind, name, part, call = key
    text = f"{kind.replace('_', ' ')} of {name or 'the model'}"
    return text + (f" {part}" if part else "") + (f", call {call}" if call else "")


def compare(
    key: Key,
    actual: Whole,
    expected: Whole,
    allowed: float | None,
    order: int = 0,
    deviation: float | None = None,
) -> Comparison:
    """Return the comparison of two wholes; an infinity or NaN on one side alone is an infinite error."""
    errors = tuple(
        inf if variant.sketch.nonfinite != expected.sketch.nonfinite or isnan(gap) else gap
        for variant in actual.variants
        for gap in [distance(variant.sketch, expected.sketch)]
    )
    terms_error = None
    may_be_terms = len(actual.variants) > 1 or any(part.is_term for part in actual.parts.values())
    if actual.is_replicated_over_tp and may_be_terms and not expected.sketch.nonfinite and key[0] in ACTIVATIONS:
        terms_error = distance(actual.sum_over_tp(), expected.sketch)
    return Comparison(key, actual, expected, errors, allowed, terms_error, order=order, deviation=deviation)


def _of_groups(records: Records, groups: Sequence[Sequence[int]]) -> dict[int, TensorRecord]:
    return {rank: records[rank] for group in groups for rank in group if rank in records}


def _first_stored(records: Records, run: Run) -> Whole | None:
    known = labels(records)
    return stored(records, known[0][0], run.replicas) if known else None
