"""Did TP happen at all, and do the shards make up the whole?"""

from __future__ import annotations

from math import prod

from tpcheck.checks.outcome import CheckOutcome
from tpcheck.records import Evidence, Suspect

_ADVICE = (
    'TP never started: add "tensor_parallel": {"autotp_size": N} to the DeepSpeed configuration, or load the model '
    'with tp_plan="auto" in transformers; what is saved is otherwise as large as without TP.'
)


def parameters_are_sharded(evidence: Evidence) -> CheckOutcome:
    """Some parameter must be smaller on each rank, and every sharded one must add up to its full shape. Exact."""
    if evidence.topology.tp == 1:
        return CheckOutcome(missed={"parameters_are_sharded": "tp is 1: nothing to shard"})
    names = [name for name in evidence.initial if name in evidence.layouts]
    sharded = [name for name in names if not evidence.layouts[name].is_replicated]
    incomplete = [name for name in sharded if not _makes_whole(evidence, name)]
    suspects = []
    if not sharded:
        suspects.append(_suspect(evidence, len(names), {"count_total": len(names), "advice": _ADVICE}))
    if incomplete:
        details = {"count_differing": len(incomplete), "count_total": len(sharded), "also": incomplete[1:]}
        details |= _sizes(evidence, incomplete[0])
        suspects.append(_suspect(evidence, len(incomplete), details, parameter=incomplete[0]))
    return CheckOutcome(dict.fromkeys(names, 0.0), tuple(suspects))


def _makes_whole(evidence: Evidence, name: str) -> bool:
    layout = evidence.layouts[name]
    held = sum(prod(shape) for shape in layout.local_shapes)
    return tuple(layout.shape) == tuple(evidence.initial[name].shape) and held >= prod(layout.shape)


def _sizes(evidence: Evidence, name: str) -> dict[str, object]:
    """Return how long the parameter and its shards are along the dim that is cut."""
    layout, whole = evidence.layouts[name], tuple(evidence.initial[name].shape)
    for dim, size in enumerate(whole):
        shards = [shape[dim] for shape in layout.local_shapes]
        is_cut = all(shard < size for shard in shards)
        if is_cut and len(layout.shape) == len(whole) and (layout.shape[dim] != size or sum(shards) != size):
            return {"dim": dim, "size": size, "shard_sizes": shards}
    return {}


def _suspect(evidence: Evidence, observed: int, details: dict[str, object], **where: str) -> Suspect:
    return Suspect(
        check="parameters_are_sharded",
        kind="sharding",
        where={"phase": "start", **where, "ranks": list(evidence.tp_group)},
        observed=float(observed),
        allowed=0.0,
        evidence=details,
    )
