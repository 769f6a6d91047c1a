"""Which leaves of a batch differ between ranks, which ranks deviate, which replicas have the same samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tpcheck.batches.records import BatchSummary, Leaf
from tpcheck.batches.repeats import Gap, Repeat
from tpcheck.core.findings import Finding

_WHOLE = "(the whole batch)"  # the field where the batch is a tensor itself

Aspect = Literal["structure", "type", "dtype", "shape", "device", "bits"]


@dataclass(frozen=True, slots=True)
class LeafDifference:
    """One leaf that is not the same on all ranks.

    Attributes:
        path: Where it is in the batch.
        differs: The first aspect that differs: whether the leaf is there, its type, dtype, shape, device, or its bits.
        deviating: Ranks that differ from the majority; all of them where there is none.
        reference: The first rank of the majority.
        leaves: Each rank's leaf, None where it has none.
    """

    path: str
    differs: Aspect
    deviating: tuple[int, ...]
    reference: int
    leaves: Mapping[int, Leaf | None]

    @property
    def shown_ranks(self) -> list[int]:
        """The reference, then every other rank that deviates."""
        return [self.reference, *(rank for rank in self.deviating if rank != self.reference)]


@dataclass(frozen=True, slots=True)
class SameSamples:
    """Replicas that have the same samples.

    Attributes:
        replicas: Their numbers.
        num_samples: How many samples.
        reordered: Whether they are in another order on some of them.
    """

    replicas: tuple[int, ...]
    num_samples: int
    reordered: bool


def leaf_differences(summaries: Mapping[int, BatchSummary]) -> tuple[LeafDifference, ...]:
    """Return every leaf that differs between the ranks: missing leaves first, then in the order of the structure.

    The size of a container is left out where a difference below it is reported as a missing leaf.
    """
    by_path = {rank: {leaf.path: leaf for leaf in summary.leaves} for rank, summary in summaries.items()}
    paths = dict.fromkeys(leaf.path for summary in summaries.values() for leaf in summary.leaves)
    differences = [
        difference
        for path in paths
        if (difference := _difference(path, {rank: leaves.get(path) for rank, leaves in by_path.items()})) is not None
    ]
    missing = [difference.path for difference in differences if difference.differs == "structure"]

    def is_explained(difference: LeafDifference) -> bool:
        below = f"{difference.path}." if difference.path else ""
        return _is_container_size(difference) and any(path.startswith(below) for path in missing)

    rest = [difference for difference in differences if not is_explained(difference)]
    return tuple(sorted(rest, key=lambda difference: difference.differs != "structure"))


def deviating_ranks(values: Mapping[int, Hashable]) -> tuple[tuple[int, ...], int]:
    """Return the ranks that differ from the majority (all where there is none), and the majority's first rank."""
    first, *others = Counter(values.values()).most_common()
    if not others:
        return (), min(values)
    if first[1] == others[0][1]:
        return tuple(values), min(values)
    deviating = tuple(rank for rank in values if values[rank] != first[0])
    return deviating, min(rank for rank in values if rank not in deviating)


def same_samples(
    rows: Mapping[int, Sequence[int]], beside: Mapping[int, bytes] | None = None
) -> tuple[SameSamples, ...]:
    """Return the sets of replicas whose batches have exactly the same samples, in any order.

    Args:
        rows: Digest of each sample, by number of the replica.
        beside: Digest of what else a batch has, by number of the replica: it is a part of the samples, too.
    """
    by_samples: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
    for replica, digests in rows.items():
        if digests:
            by_samples.setdefault((tuple(sorted(digests)), (beside or {}).get(replica, b"")), []).append(replica)
    return tuple(
        SameSamples(tuple(replicas), len(digests), len({tuple(rows[replica]) for replica in replicas}) > 1)
        for (digests, _), replicas in by_samples.items()
        if len(replicas) > 1
    )


def _difference(path: str, leaves: Mapping[int, Leaf | None]) -> LeafDifference | None:
    aspects = {rank: _aspects(leaf) for rank, leaf in leaves.items()}
    deviating, reference = deviating_ranks(aspects)
    if not deviating:
        return None
    expected = aspects[reference]
    actual = next(aspects[rank] for rank in deviating if aspects[rank] != expected)
    if not expected or not actual:
        return LeafDifference(path, "structure", deviating, reference, leaves)
    differs = next(aspect for (aspect, a), (_, b) in zip(expected, actual, strict=True) if a != b)
    return LeafDifference(path, differs, deviating, reference, leaves)


def _aspects(leaf: Leaf | None) -> tuple[tuple[Aspect, Hashable], ...]:
    """Return what is compared of a leaf, in the order in which differences are reported."""
    if leaf is None:
        return ()
    return (
        ("type", leaf.kind),
        ("dtype" if leaf.kind in ("tensor", "array") else "type", leaf.dtype),
        ("shape", leaf.shape),
        ("device", leaf.device.partition(":")[0]),  # the index is another one on every rank
        ("bits", leaf.digest),
    )


def _is_container_size(difference: LeafDifference) -> bool:
    """Return whether a container has another number of parts."""
    return difference.differs == "shape" and all(
        leaf is None or leaf.kind == "value" for leaf in difference.leaves.values()
    )


def batches_agree_within_tp(
    differences: Sequence[LeafDifference], *, step: int, located: Mapping[str, Any], where: Mapping[str, Any]
) -> Finding:
    """Return how one step's batch differs in one TP group. Exact.

    Args:
        differences: Leaves that differ, the one to report first.
        step: How many batches came before.
        located: What is known of the first difference: `index`, and evidence by name.
        where: More keys of `Finding.where`, such as `dp_rank`.
    """
    first, *others = differences
    evidence = dict(located)
    index = evidence.pop("index", None)
    where = {"step": step, "field": first.path or _WHOLE, "ranks": list(first.deviating), **where}
    return Finding(
        check="batches_agree_within_tp",
        where=where if index is None else {**where, "index": index},
        observed=float(evidence.get("count_differing", len(first.deviating))),
        allowed=0.0,
        evidence={
            "differs": first.differs,
            **_by_rank(first),
            **evidence,
            "also": [{"field": each.path, "differs": each.differs} for each in others],
        },
    )


def batches_differ_across_dp(
    same: Sequence[SameSamples], *, field: str, step: int, replicas: Sequence[Sequence[int]]
) -> Finding:
    """Return which replicas train on the same samples at one step. Exact.

    Args:
        same: Sets of replicas with the same samples.
        field: The leaf that identifies samples best.
        step: How many batches came before.
        replicas: Ranks of each.
    """
    largest = max(same, key=lambda each: len(each.replicas))
    return Finding(
        check="batches_differ_across_dp",
        where={"step": step, "field": field or _WHOLE, "ranks": _ranks(replicas, largest.replicas)},
        observed=float(largest.num_samples),
        allowed=0.0,
        evidence={
            "replicas": list(largest.replicas),
            "order": "another order" if largest.reordered else "the same order",
            "also": [{"replicas": list(each.replicas)} for each in same if each is not largest],
        },
    )


def samples_come_once(noticed: Repeat | Gap, *, ranks: Sequence[int]) -> Finding:
    """Return which batch has samples that its rank had in this epoch, or comes behind samples that were left out."""
    where = {"step": noticed.step, "field": "samples", "ranks": list(ranks)}
    if isinstance(noticed, Gap):
        evidence: dict[str, Any] = {
            "batches_left_out": noticed.num_batches,
            "first_index": noticed.first_index,
            "expected_index": noticed.expected_index,
        }
        return Finding("samples_come_once", where, float(noticed.num_batches), 0.0, evidence=evidence)
    evidence = {"repeats_step": noticed.of_step, "equal": noticed.read}
    return Finding("samples_come_once", where, float(noticed.num_samples), 0.0, evidence=evidence)


def uneven_batches(
    counts: Sequence[int], *, ended: Sequence[int], axis: str, step: int, members: Sequence[Sequence[int]]
) -> Finding | None:
    """Return which ranks, or replicas, have no more batches while others have.

    Args:
        counts: How many batches each has got, at least.
        ended: Positions in `counts` of those that have no more.
        axis: `tp` or `dp`.
        step: The step that they do not reach together.
        members: Ranks of each: one for the axis `tp`, those of a TP group for `dp`.
    """
    # All have a batch, or all have ended; even then counts may differ, where rounds are `every` batches apart.
    if len(ended) in (0, len(counts)) and len(set(counts)) == 1:
        return None
    names = [f"rank {ranks[0]}" if axis == "tp" else f"replica {number}" for number, ranks in enumerate(members)]
    return Finding(
        check="batches_agree_within_tp" if axis == "tp" else "batches_differ_across_dp",
        where={"step": step, "field": "number of batches", "ranks": _ranks(members, ended or range(len(members)))},
        observed=float(max(counts) - min(counts) or 1),
        allowed=0.0,
        evidence={
            "differs": "length",
            "batches": dict(zip(names, counts, strict=True)),
            "ended": [names[position] for position in ended],
        },
    )


def _ranks(members: Sequence[Sequence[int]], positions: Iterable[int]) -> list[int]:
    return sorted(rank for position in positions for rank in members[position])


def _by_rank(difference: LeafDifference) -> dict[str, Any]:
    """Return what the reference and each deviating rank have, where that is a short value."""
    if difference.differs == "structure":
        return {"missing_on": [rank for rank, leaf in difference.leaves.items() if leaf is None]}
    if difference.differs == "bits":
        return {}
    name = "dtype" if difference.differs == "type" else difference.differs
    return {
        "by_rank": {f"rank {rank}": getattr(difference.leaves[rank], name, None) for rank in difference.shown_ranks}
    }
