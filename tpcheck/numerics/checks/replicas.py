"""Are replicas bitwise the same on every rank that has one?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tpcheck.numerics.evidence import CheckOutcome, Evidence, ReplicaFacts, Suspect

_Item = tuple[str, str]  # kind (parameter, gradient, buffer) and name


def replicas_agree_at_start(evidence: Evidence) -> CheckOutcome:
    """Compare the replicas of parameters and buffers before the first step. Exact."""
    return _replicas_agree(evidence, 0, {"phase": "start"})


def replicas_agree_after(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare the replicas of gradients, parameters and buffers after `step`. Exact."""
    return _replicas_agree(evidence, step + 1, {"phase": "update", "step": step})


def _replicas_agree(evidence: Evidence, moment: int, where: dict[str, object]) -> CheckOutcome:
    if evidence.dp_rank:  # the evidence of the first TP group has the digests of all ranks
        return CheckOutcome()
    digests = [facts.digests[moment] for facts in evidence.facts]
    margins: dict[str, float] = {}
    wrong: dict[tuple[str, tuple[int, ...], bool], list[_Item]] = {}
    for item in dict.fromkeys(item for by_rank in digests for item in by_rank):
        for axis, group in _replica_groups(evidence, item, is_trained=moment > 0):
            margins[f"{item[0]} {item[1]} over {axis}"] = 0.0
            deviating = _deviating(group, [digests[rank].get(item) for rank in group])
            if deviating:
                differed_at_start = moment > 0 and replicas_differ(evidence, 0, item, group)
                wrong.setdefault((axis, deviating, differed_at_start), []).append(item)
    suspects = (_suspect(evidence, moment, *key, items, where) for key, items in wrong.items())
    return CheckOutcome(margins, tuple(suspects))


def replicas_differ(evidence: Evidence, moment: int, item: _Item, group: Sequence[int]) -> bool:
    """Return whether the replicas of `item` differ between the ranks of a group; moment 0 is before the first step."""
    return len({evidence.facts[rank].digests[moment].get(item) for rank in group}) > 1


def _replica_groups(evidence: Evidence, item: _Item, *, is_trained: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    kind, name = item
    if kind == "buffer":
        over_tp = name in evidence.buffers
        over_dp = not is_trained  # running statistics are those of each replica's batches
    else:
        over_tp = name in evidence.layouts and evidence.layouts[name].is_replicated
        over_dp = True
    for axis, replicated in (("tp", over_tp), ("dp", over_dp)):
        if evidence.topology.sizes[axis] > 1 and replicated:
            for group in evidence.topology.groups(axis):
                yield axis, group


def _deviating(group: tuple[int, ...], digests: list[str | None]) -> tuple[int, ...]:
    """Return the ranks that differ from the majority; all of them where there is none."""
    counts = Counter(digests).most_common()
    if len(counts) == 1:
        return ()
    majority = counts[0][0] if counts[0][1] > counts[1][1] else object()
    return tuple(rank for rank, digest in zip(group, digests, strict=True) if digest != majority)


def _suspect(
    evidence: Evidence,
    moment: int,
    axis: str,
    ranks: tuple[int, ...],
    differed_at_start: bool,
    items: list[_Item],
    where: dict[str, object],
) -> Suspect:
    first_kind, first = next((item for item in items if item[0] == "gradient"), items[0])
    is_gradient = first_kind == "gradient" and axis == "tp" and set(ranks) <= set(evidence.tp_group)
    parts = [step.gradients.get(first) for step in evidence.candidate[moment - 1]] if is_gradient else []
    return Suspect(
        check="replicas_agree",
        kind="replica",
        where={
            **where,
            **({"parameter": first} if first_kind != "buffer" else {"module": first.rpartition(".")[0]}),
            "field": f"{first_kind} {first} over {axis}",
            "ranks": list(ranks),
        },
        observed=float(len(items)),
        allowed=0.0,
        evidence={
            "count_differing": len(items),
            "also": [{"kind": kind, "name": name} for kind, name in items if (kind, name) != (first_kind, first)],
        },
        # A gradient that differs is explained by how it relates to the expected one.
        expected=evidence.reference[moment - 1].gradients.get(first) if is_gradient else None,
        actual_parts=() if any(part is None for part in parts) else tuple(parts),
        is_replicated=True,
        replicas=ReplicaFacts(Counter(kind for kind, _ in items), differed_at_start=differed_at_start),
    )
