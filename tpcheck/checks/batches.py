"""Do the ranks of a TP group get the same batch, and the replicas of DP different samples?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpcheck.compare.batches import FieldDifference, SameSamples
from tpcheck.records import Suspect


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
