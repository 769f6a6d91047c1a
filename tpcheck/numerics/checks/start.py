"""What must hold before the first step: the groups, the shards, the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from tpcheck.numerics.checks.parameters import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.numerics.evidence import CheckOutcome, Evidence, Suspect


def groups_match_topology(evidence: Evidence) -> CheckOutcome:
    """Compare every live group of every rank with the declared one. Exact."""
    margins: dict[str, float] = {}
    wrong: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for rank, facts in enumerate(evidence.facts):
        for axis, groups in facts.group_ranks.items():
            margins[f"{axis} of rank {rank}"] = 0.0
            declared = evidence.topology.peers(rank, axis)
            wrong.setdefault(axis, []).extend((rank, live) for live in groups if live != declared)
    suspects = tuple(
        Suspect(
            check="groups_match_topology",
            kind="group",
            where={"phase": "start", "field": f"{axis} group", "ranks": sorted({rank for rank, _ in found})},
            observed=float(len(found)),
            allowed=0.0,
            evidence={
                "live": [list(live) for _, live in found],
                "declared": [list(evidence.topology.peers(rank, axis)) for rank, _ in found],
            },
        )
        for axis, found in wrong.items()
        if found
    )
    return CheckOutcome(margins, suspects)


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
        suspects.append(_sharding_suspect(evidence, len(names), {"count_total": len(names), "advice": _ADVICE}))
    if incomplete:
        details = {"count_differing": len(incomplete), "count_total": len(sharded), "also": incomplete[1:]}
        details |= _sizes(evidence, incomplete[0])
        suspects.append(_sharding_suspect(evidence, len(incomplete), details, parameter=incomplete[0]))
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


def _sharding_suspect(evidence: Evidence, observed: int, details: dict[str, object], **where: str) -> Suspect:
    return Suspect(
        check="parameters_are_sharded",
        kind="sharding",
        where={"phase": "start", **where, "ranks": list(evidence.tp_group)},
        observed=float(observed),
        allowed=0.0,
        evidence=details,
    )


_CHECK = "weights_match_reference"


def weights_match_reference(evidence: Evidence) -> CheckOutcome:
    """Compare every parameter's shards with the reference's parameter. Exact; each wrong one is a suspect."""
    compared, missed = compare_parameters(evidence, evidence.initial, evidence.initial_parts, lambda name, whole: 0.0)
    wrong = [one for one in compared.values() if not one.found.agrees]
    suspects = tuple(_weight_suspect(evidence, one, compared, len(wrong)) for one in wrong)
    return CheckOutcome({name: one.found.margin for name, one in compared.items()}, suspects, missed)


def _weight_suspect(
    evidence: Evidence, one: ComparedParameter, compared: Mapping[str, ComparedParameter], num_wrong: int
) -> Suspect:
    beside = [other for other in compared.values() if other.name != one.name and _around(other) == _around(one)]
    wrong, right = ([other.name for other in beside if other.found.agrees is agrees] for agrees in (False, True))
    details: dict[str, Any] = {"first_of": num_wrong}
    if wrong and right:
        details["beside_it"] = {"wrong": wrong, "right": right}
    suspect = parameter_suspect(evidence, one, check=_CHECK, kind="weight", where={"phase": "start"}, details=details)
    layout = evidence.layouts[one.name]
    complete = all(tuple(part.shape) == shape for part, shape in zip(one.parts, layout.local_shapes, strict=True))
    return replace(
        suspect,
        actual=layout.assemble(one.parts) if complete and not layout.is_replicated else None,
        others={
            name: (other.expected, *other.expected_parts)
            for name, other in compared.items()
            if name != one.name and other.expected_parts
        },
    )


def _around(one: ComparedParameter) -> str:
    """Return the module around the one that owns the parameter."""
    return one.module.rpartition(".")[0]
