"""Which leaves of a batch differ between ranks, which ranks deviate, and which replicas hold the same samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tpcheck.batches.records import BatchFacts, Leaf
from tpcheck.numerics.evidence import Suspect

What = Literal["structure", "type", "dtype", "shape", "device", "bits"]


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """One leaf that is not the same on all ranks.

    Attributes:
        path: Place in the batch.
        what: The first thing that differs: whether the leaf is there, its kind, dtype, shape, device, or only its bits.
        deviating: Ranks that differ from the majority; all of them where there is none.
        reference: The first rank of the majority.
        leaves: Each rank's leaf, None where it has none.
    """

    path: str
    what: What
    deviating: tuple[int, ...]
    reference: int
    leaves: Mapping[int, Leaf | None]


@dataclass(frozen=True, slots=True)
class SameSamples:
    """Replicas that hold the same samples.

    Attributes:
        replicas: Their numbers.
        number: How many samples.
        reordered: Whether they are in another order on some of them.
    """

    replicas: tuple[int, ...]
    number: int
    reordered: bool


def field_differences(facts: Mapping[int, BatchFacts]) -> tuple[FieldDifference, ...]:
    """Return every leaf that differs between the ranks: other structure first, then in the order of the structure.

    What lies inside a container that is itself of another type or size is not told apart leaf by leaf.
    """
    by_path = {rank: {leaf.path: leaf for leaf in held.leaves} for rank, held in facts.items()}
    paths = dict.fromkeys(leaf.path for held in facts.values() for leaf in held.leaves)
    found: list[FieldDifference] = []
    for path in paths:
        difference = _difference(path, {rank: leaves.get(path) for rank, leaves in by_path.items()})
        if difference is not None:
            found.append(difference)
    missing = {difference.path for difference in found if difference.what == "structure"}
    found = [each for each in found if not (_is_size(each) and any(path.startswith(_below(each)) for path in missing))]
    return tuple(sorted(found, key=lambda difference: difference.what != "structure"))


def deviating(values: Mapping[int, Hashable]) -> tuple[tuple[int, ...], int]:
    """Return the ranks that differ from the majority (all where there is none), and the majority's first rank."""
    first, *others = counts = Counter(values.values()).most_common()
    if not others:
        return (), min(values)
    if first[1] == others[0][1]:
        return tuple(values), min(values)
    return tuple(rank for rank in values if values[rank] != first[0]), min(
        rank for rank in values if values[rank] == counts[0][0]
    )


def same_samples(rows: Mapping[int, Sequence[str]]) -> tuple[SameSamples, ...]:
    """Return the sets of replicas whose batches hold exactly the same samples, in any order."""
    by_samples: dict[tuple[str, ...], list[int]] = {}
    for rank, digests in rows.items():
        if digests:
            by_samples.setdefault(tuple(sorted(digests)), []).append(rank)
    return tuple(
        SameSamples(tuple(ranks), len(digests), len({tuple(rows[rank]) for rank in ranks}) > 1)
        for digests, ranks in by_samples.items()
        if len(ranks) > 1
    )


def _difference(path: str, leaves: Mapping[int, Leaf | None]) -> FieldDifference | None:
    ranks, reference = deviating({rank: None if leaf is None else _identity(leaf) for rank, leaf in leaves.items()})
    if not ranks:
        return None
    other = next(rank for rank in ranks if _facets(leaves[rank]) != _facets(leaves[reference]))
    return FieldDifference(path, _what(leaves[reference], leaves[other]), ranks, reference, leaves)


def _identity(leaf: Leaf) -> tuple[object, ...]:
    return tuple(value for _, value in _facets(leaf))


def _facets(leaf: Leaf | None) -> tuple[tuple[What, object], ...]:
    """Return what is compared of a leaf, in the order in which a difference is told."""
    if leaf is None:
        return ()
    return (
        ("type", leaf.kind),
        ("dtype" if leaf.kind in ("tensor", "array") else "type", leaf.dtype),
        ("shape", leaf.shape),
        ("device", leaf.device.partition(":")[0]),  # every rank has a device of its own
        ("bits", leaf.digest),
    )


def _what(one: Leaf | None, other: Leaf | None) -> What:
    if one is None or other is None:
        return "structure"
    return next(what for (what, a), (_, b) in zip(_facets(one), _facets(other), strict=True) if a != b)


def _is_size(difference: FieldDifference) -> bool:
    """Tell whether a container has another number of parts: the parts that are missing say more."""
    return difference.what == "shape" and all(
        leaf is None or leaf.kind == "value" for leaf in difference.leaves.values()
    )


def _below(difference: FieldDifference) -> str:
    return f"{difference.path}." if difference.path else ""


def batches_agree_within_tp(
    differences: Sequence[FieldDifference], *, step: int, located: Mapping[str, Any], where: Mapping[str, Any]
) -> Suspect | None:
    """Return what is wrong with one step's batch in one TP group. Exact.

    Args:
        differences: Leaves that differ, the most telling first.
        step: How many batches came before.
        located: What is known of the first difference: `index`, and evidence by name.
        where: More of the place, such as `dp_rank`.
    """
    if not differences:
        return None
    first, *others = differences
    facts = dict(located)
    index = facts.pop("index", None)
    place = {"step": step, "field": first.path or "(the whole batch)", "ranks": list(first.deviating), **where}
    return Suspect(
        check="batches_agree_within_tp",
        kind="replica",
        where=place if index is None else {**place, "index": index},
        observed=float(facts.get("count_differing", len(first.deviating))),
        allowed=0.0,
        evidence={
            "differs": first.what,
            **_by_rank(first),
            **facts,
            "also": [{"field": each.path, "differs": each.what} for each in others],
        },
    )


def batches_differ_across_dp(
    found: Sequence[SameSamples], *, field: str, step: int, replicas: Sequence[Sequence[int]]
) -> Suspect | None:
    """Return which replicas train on the same samples at one step. Exact.

    Args:
        found: By number of the replica.
        field: Leaf that tells most.
        step: How many batches came before.
        replicas: Ranks of each.
    """
    if not found:
        return None
    most = max(found, key=lambda same: len(same.replicas))
    return Suspect(
        check="batches_differ_across_dp",
        kind="replica",
        where={"step": step, "field": field, "ranks": _ranks(replicas, most.replicas)},
        observed=float(most.number),
        allowed=0.0,
        evidence={
            "replicas": list(most.replicas),
            "order": "another order" if most.reordered else "the same order",
            "also": [{"replicas": list(same.replicas)} for same in found if same is not most],
        },
    )


def uneven_batches(
    counts: Sequence[int], *, ended: Sequence[int], axis: str, step: int, members: Sequence[Sequence[int]]
) -> Suspect | None:
    """Return which ranks, or replicas, ran out of batches before the others.

    Args:
        counts: How many batches each has got, at least.
        ended: Places of those that have no more.
        axis: `tp` or `dp`.
        step: The step that they do not reach together.
        members: Ranks of each: one for the axis `tp`, those of a TP group for `dp`.
    """
    if len(ended) in (0, len(counts)) and len(set(counts)) == 1:
        return None
    names = [f"rank {ranks[0]}" if axis == "tp" else f"replica {place}" for place, ranks in enumerate(members)]
    return Suspect(
        check="batches_agree_within_tp" if axis == "tp" else "batches_differ_across_dp",
        kind="replica",
        where={"step": step, "field": "number of batches", "ranks": _ranks(members, ended or range(len(members)))},
        observed=float(max(counts) - min(counts) or 1),
        allowed=0.0,
        evidence={
            "differs": "length",
            "batches": dict(zip(names, counts, strict=True)),
            "ended": [names[place] for place in ended],
        },
    )


def _ranks(members: Sequence[Sequence[int]], places: Iterable[int]) -> list[int]:
    return sorted(rank for place in places for rank in members[place])


def _by_rank(difference: FieldDifference) -> dict[str, Any]:
    """Return what the reference and each deviating rank have, where that can be said in a word."""
    leaves = _compared_leaves(difference)
    if difference.what in ("dtype", "shape", "device"):
        values = {rank: None if leaf is None else getattr(leaf, difference.what, None) for rank, leaf in leaves}
        return {"by_rank": {f"rank {rank}": value for rank, value in values.items()}}
    if difference.what == "structure":
        return {"missing_on": [rank for rank, leaf in difference.leaves.items() if leaf is None]}
    if difference.what == "type":
        return {"by_rank": {f"rank {rank}": leaf.dtype for rank, leaf in leaves if leaf is not None}}
    return {}


def _compared_leaves(difference: FieldDifference) -> list[tuple[int, Any]]:
    ranks = [difference.reference, *(rank for rank in difference.deviating if rank != difference.reference)]
    return [(rank, difference.leaves[rank]) for rank in ranks]
