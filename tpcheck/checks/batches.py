"""Do the ranks of a TP group get the same batch, and the replicas of DP different samples?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpcheck.checks.outcome import named_few
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
            "also": named_few(f"{each.path} ({each.what})" for each in others),
        },
    )


def batches_differ_across_dp(found: Sequence[SameSamples], *, field: str, step: int) -> Suspect | None:
    """Return which replicas train on the same samples at one step. Exact."""
    if not found:
        return None
    most = max(found, key=lambda same: len(same.ranks))
    return Suspect(
        check="batches_differ_across_dp",
        kind="replica",
        where={"step": step, "field": field, "ranks": list(most.ranks)},
        observed=float(most.number),
        allowed=0.0,
        evidence={
            "order": "another order on each replica" if most.reordered else "the same order",
            "also": named_few(f"ranks {', '.join(map(str, same.ranks))}" for same in found if same is not most),
        },
    )


def uneven_batches(counts: Mapping[int, int], *, ended: Sequence[int], axis: str, step: int) -> Suspect | None:
    """Return which ranks ran out of batches before the others.

    Args:
        counts: How many batches each rank got.
        ended: Ranks that have no more.
        axis: `tp` or `dp`.
        step: The step that they do not reach together.
    """
    if len(set(counts.values())) == 1 and len(ended) in (0, len(counts)):
        return None
    return Suspect(
        check="batches_agree_within_tp" if axis == "tp" else "batches_differ_across_dp",
        kind="replica",
        where={"step": step, "field": "number of batches", "ranks": list(ended) or list(counts)},
        observed=float(len(ended) or len(counts)),
        allowed=0.0,
        evidence={
            "differs": "length",
            "batches": {f"rank {rank}": count for rank, count in counts.items()},
            "ended": list(ended),
        },
    )


def _by_rank(difference: FieldDifference) -> dict[str, Any]:
    """Return what each rank has, where that can be said in a word."""
    shown = {rank: None if leaf is None else getattr(leaf, difference.what, None) for rank, leaf in _shown(difference)}
    if difference.what in ("dtype", "shape", "device"):
        return {"by_rank": {f"rank {rank}": value for rank, value in shown.items()}}
    if difference.what == "structure":
        return {"missing_on": [rank for rank, leaf in difference.leaves.items() if leaf is None]}
    if difference.what == "type":
        return {"by_rank": {f"rank {rank}": leaf.dtype for rank, leaf in _shown(difference) if leaf is not None}}
    return {}


def _shown(difference: FieldDifference) -> list[tuple[int, Any]]:
    ranks = [difference.reference, *(rank for rank in difference.deviating if rank != difference.reference)]
    return [(rank, difference.leaves[rank]) for rank in ranks[:4]]
