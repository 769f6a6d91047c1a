"""Ranks' parts of one tensor, put together: the whole as its sketch, and as ranks with other bits have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot, sqrt

import torch

from tpcheck.numerics.sketch import Sketch
from tpcheck.runs.trace.records import Reading, TensorRecord

WHOLE_LABELS = ("layout", "whole")


@dataclass(frozen=True, slots=True)
class Variant:
    """The whole tensor with the part that some ranks have, where replicas differ.

    Attributes:
        ranks: Which have it.
        sketch: Of the whole.
    """

    ranks: tuple[int, ...]
    sketch: Sketch


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part, under the reading that was chosen.

    Attributes:
        piece: Names the elements.
        sketch: Of them.
        digest: Of their bits.
        deviation: By which rounding moves the sketch; None where that was not measured.
        is_slice: The rank has a slice of each sequence.
    """

    piece: str
    sketch: Sketch
    digest: str
    deviation: float | None
    is_term: bool = False
    is_slice: bool = False


@dataclass(frozen=True, slots=True)
class Whole:
    """One tensor of one run.

    Attributes:
        label: Of the reading.
        shape: Of the whole.
        dtype: Of the parts.
        variants: The first has the part of most replicas everywhere.
        parts: Each rank's, by global rank.
        groups: The TP groups whose parts these are.
        deviation: By which rounding moves the whole; None where that was not measured.
        factor: By what sums over the ranks were multiplied.
        adds_groups: What TP groups have is added up, as rows of samples are; else they hold replicas.
        copies: How often each element was added up.
    """

    label: str
    shape: tuple[int, ...]
    dtype: str
    variants: tuple[Variant, ...]
    parts: Mapping[int, Part]
    groups: tuple[tuple[int, ...], ...]
    deviation: float | None
    factor: float = 1.0
    copies: int = 1
    adds_groups: bool = False

    @property
    def sketch(self) -> Sketch:
        """The whole as most replicas have it."""
        return self.variants[0].sketch

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.parts)

    @property
    def norm(self) -> float:
        """Its Frobenius norm, exact: squares add up over rows, and over copies as often as there are some."""
        return sqrt(max(0.0, self.sketch.sum_squares * self.copies))

    @property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        """The ranks that hold each piece."""
        pieces: dict[str, list[int]] = {}
        for rank, part in self.parts.items():
            pieces.setdefault(part.piece, []).append(rank)
        return {piece: tuple(ranks) for piece, ranks in pieces.items()}

    @property
    def is_replicated_over_tp(self) -> bool:
        """Whether the ranks of each TP group hold the same elements, if any (ZeRO), and are more than one."""
        return all(
            len({self.parts[rank].piece for rank in group if rank in self.parts}) <= 1 for group in self.groups
        ) and any(len(group) > 1 for group in self.groups)

    @property
    def is_sharded_over_tp(self) -> bool:
        return any(len({self.parts[rank].piece for rank in group if rank in self.parts}) > 1 for group in self.groups)

    @property
    def is_bitwise_replicated(self) -> bool:
        """Whether all ranks of each TP group have the same bits."""
        return all(len({self.parts[rank].digest for rank in group if rank in self.parts}) <= 1 for group in self.groups)

    def by_group(self) -> tuple[Sketch | None, ...]:
        """Return the whole that each TP group holds alone; None where a group lacks pieces (ZeRO)."""
        pieces = set(self.pieces)
        wholes: list[Sketch | None] = []
        for group in self.groups:
            parts = {self.parts[rank].piece: self.parts[rank].sketch for rank in group if rank in self.parts}
            wholes.append(total(parts.values()) if set(parts) == pieces else None)
        return tuple(wholes)

    def sum_over_tp(self) -> Sketch:
        """Return the sum of the parts as terms: over the ranks of each TP group, then as replicas are combined."""
        sums = [total(self.parts[rank].sketch for rank in group if rank in self.parts) for group in self.groups]
        return total(sums).scaled(self.factor) if self.adds_groups else sums[0]


def total(sketches: Iterable[Sketch]) -> Sketch:
    """Return the sum of sketches."""
    summed = None
    for each in sketches:
        summed = each if summed is None else summed + each
    return Sketch.zero() if summed is None else summed


Records = Mapping[int, TensorRecord]  # of one tensor, by rank


def labels(records: Records) -> list[tuple[str, tuple[int, ...]]]:
    """Return the readings, with the shape of the whole, that all ranks share."""
    first, *others = records.values()
    shared = [(reading.label, reading.shape) for reading in first.readings]
    for record in others:
        labels = {(reading.label, reading.shape) for reading in record.readings}
        shared = [each for each in shared if each in labels]
    return shared


def reading_of(record: TensorRecord, label: str) -> Reading | None:
    return next((reading for reading in record.readings if reading.label == label), None)


def stored(records: Records, label: str, groups: Sequence[Sequence[int]]) -> Whole:
    """Return a tensor of which ranks with the same piece are replicas, over TP and DP: a parameter's.

    Terms that are known to be some (a `Partial` DTensor) are added up over each TP group: the optimizer does that.
    """
    parts = parts_of(records, label)
    if all(part.is_term for part in parts.values()):
        parts = _added_up(parts, groups)
    base, variants = _replicas(parts)
    deviations: dict[str, float | None] = {}
    for part in parts.values():
        deviations[part.piece] = _larger(deviations.get(part.piece), part.deviation)
    return _whole(records, label, groups, parts, base, variants, _hypot(deviations.values()))


def _added_up(parts: Mapping[int, Part], groups: Sequence[Sequence[int]]) -> dict[int, Part]:
    """Return for each rank the sum of the terms that the ranks of its TP group hold of the same elements."""
    sums = {}
    for group in groups:
        for rank in group:
            if rank in parts:
                terms = [parts[peer] for peer in group if peer in parts and parts[peer].piece == parts[rank].piece]
                digests = " ".join(term.digest for term in terms)
                deviation = _hypot(term.deviation for term in terms)
                sums[rank] = Part(parts[rank].piece, total(term.sketch for term in terms), digests, deviation)
    return sums


def computed(records: Records, label: str, groups: Sequence[Sequence[int]], factor: float, copies: int = 1) -> Whole:
    """Return a tensor that is a sum over TP groups, times `factor`; each sample is there `copies` times."""
    parts = parts_of(records, label)
    bases, variants_of, deviations_of = [], [], []
    for group in groups:
        of_group = {rank: parts[rank] for rank in group if rank in parts}
        base, variants = _replicas(of_group)
        deviations: dict[str, float | None] = {}
        for part in of_group.values():
            deviations[part.piece] = _larger(deviations.get(part.piece), part.deviation)
        bases.append(base)
        variants_of.append(variants)
        deviations_of.append(_hypot(deviations.values()))
    variants = [
        Variant(variant.ranks, total([*bases[:number], variant.sketch, *bases[number + 1 :]]).scaled(factor))
        for number, of_group_variants in enumerate(variants_of)
        for variant in of_group_variants
    ]
    deviation = _hypot(deviations_of)
    scaled = None if deviation is None else deviation * factor
    whole = _whole(records, label, groups, parts, total(bases).scaled(factor), variants, scaled, factor, copies)
    return replace(whole, adds_groups=True)


def parts_of(records: Records, label: str) -> dict[int, Part]:
    """Return each rank's part under a reading."""
    parts = {}
    for rank, record in records.items():
        reading = reading_of(record, label)
        assert reading is not None
        is_slice = bool(reading.order)
        parts[rank] = Part(reading.piece, reading.sketch, record.digest, reading.deviation, reading.is_term, is_slice)
    return parts


def sketch_of_whole(records: Records, label: str) -> Sketch | None:
    """Return the sketch of a whole parameter or state; None where no rank has it under this reading."""
    readings = [reading for record in records.values() if (reading := reading_of(record, label)) is not None]
    return total({reading.piece: reading.sketch for reading in readings}.values()) if readings else None


def _replicas(parts: Mapping[int, Part]) -> tuple[Sketch, list[Variant]]:
    """Return the sum of all pieces, each as most ranks have it, and that sum with each part that has other bits."""
    holders: dict[str, dict[str, list[int]]] = {}
    for rank, part in parts.items():
        holders.setdefault(part.piece, {}).setdefault(part.digest, []).append(rank)
    most_common = {piece: max(held, key=lambda bits: len(held[bits])) for piece, held in holders.items()}
    chosen = {piece: parts[held[most_common[piece]][0]].sketch for piece, held in holders.items()}
    variants = [
        Variant(tuple(ranks), total({**chosen, piece: parts[ranks[0]].sketch}.values()))
        for piece, held in holders.items()
        for bits, ranks in held.items()
        if bits != most_common[piece]
    ]
    return total(chosen.values()), variants


def _whole(
    records: Records,
    label: str,
    groups: Sequence[Sequence[int]],
    parts: Mapping[int, Part],
    base: Sketch,
    variants: Sequence[Variant],
    deviation: float | None,
    factor: float = 1.0,
    copies: int = 1,
) -> Whole:
    first = next(iter(records.values()))
    reading = reading_of(first, label)
    assert reading is not None
    deviating = {rank for variant in variants for rank in variant.ranks}
    agreeing = tuple(rank for rank in parts if rank not in deviating)
    return Whole(
        label,
        reading.shape,
        first.dtype,
        (Variant(agreeing, base), *variants),
        parts,
        tuple(map(tuple, groups)),
        deviation,
        factor,
        copies,
    )


def _larger(first: float | None, second: float | None) -> float | None:
    return second if first is None else first if second is None else max(first, second)


def _hypot(deviations: Iterable[float | None]) -> float | None:
    known = [deviation for deviation in deviations if deviation is not None]
    return hypot(*known) if known else None


@dataclass(frozen=True, slots=True)
class Pairing:
    """Under which readings the two runs' tensor is compared.

    Attributes:
        actual, expected: Labels; empty where none was found.
        reason: Why not.
    """

    actual: str = ""
    expected: str = ""
    reason: str = ""


def pair_readings(
    actual: Records,
    expected: Records,
    groups_e: Sequence[Sequence[int]],
    *,
    numbers: tuple[Callable[[Records, str], int], Callable[[Records, str], int]],
    preferred: tuple[str, str] | None = None,
) -> Pairing:
    """Return the readings under which both runs have a whole of the same shape and number of elements.

    Where several are left, the expected run's ranks decide: equal ones hold the whole, others are shards.

    Args:
        groups_e: TP groups of the expected run.
        numbers: For each run, a function that counts the elements of the whole, in the same unit.
        preferred: Labels under which the same parameter's weights were compared.
    """
    labels_a, labels_e = labels(actual), labels(expected)
    if not labels_a or not labels_e:
        return Pairing(reason="its place in the whole is unknown")
    pairs = [(a, e) for a, shape_a in labels_a for e, shape_e in labels_e if shape_a == shape_e]
    if not pairs:
        shapes = [" or ".join(dict.fromkeys(str(list(shape)) for _, shape in each)) for each in (labels_a, labels_e)]
        return Pairing(reason=f"the shapes differ ({shapes[0]} and {shapes[1]})")
    complete = [(a, e) for a, e in pairs if numbers[0](actual, a) == numbers[1](expected, e)]
    if not complete:
        return Pairing(reason="the ranks' parts do not make up the same number of elements in both runs")
    if preferred in complete:
        return Pairing(*preferred)
    as_whole = [pair for pair in complete if pair[0] in WHOLE_LABELS and pair[1] in WHOLE_LABELS]
    sharded = [pair for pair in complete if pair not in as_whole]
    if len(complete) == 1 or not as_whole or not sharded:
        return Pairing(*complete[0])
    are_equal = all(len({expected[rank].digest for rank in group if rank in expected}) <= 1 for group in groups_e)
    return Pairing(*(as_whole if are_equal else sharded)[0])


def num_stored(records: Records, label: str) -> int:
    """Return the number of elements of all distinct pieces."""
    return sum({part.piece: part.sketch.numel for part in parts_of(records, label).values()}.values())


def num_computed(records: Records, label: str, groups: Sequence[Sequence[int]]) -> int:
    """Return the number of elements that the TP groups hold together; 0 where rows are not those of samples."""
    first = next(iter(records.values()))
    reading = reading_of(first, label)
    if reading is None or -1 not in reading.shape:
        return 0
    return sum(num_stored({rank: records[rank] for rank in group if rank in records}, label) for group in groups)


def epsilon(dtype: str) -> float:
    """Return the machine epsilon of a dtype's name; 0 for integers."""
    kind = getattr(torch, dtype, None)
    return float(torch.finfo(kind).eps) if isinstance(kind, torch.dtype) and kind.is_floating_point else 0.0


def spacing_of_subnormals(dtype: str) -> float:
    """Return by what a dtype's numbers around zero differ: 6e-8 in float16; 0 for integers."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        return 0.0
    return float(torch.finfo(kind).smallest_normal * torch.finfo(kind).eps)
