"""Do the groups, the shards and the weights agree before the first step?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf, prod

from tpcheck.numerics.checks.suspects import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.numerics.evidence import CheckOutcome, Evidence, ShardFacts, SiblingWeights, Suspect


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


# Advice for this check alone: the one of the cause is about checkpoints.
_ADVICE = (
    "The library found nothing in this model that it shards, so every rank trains and saves the full model. Give it "
    "rules (DeepSpeed: tensor_parallel.partition_config; transformers: tp_plan), or shard by a function of your own: "
    "shard(model, rank) beside build and --backend custom, or shard= in Python."
)
_ADVICE_LOST = (
    "The library has replaced the layers that held them by layers of its own, which know nothing of them. For "
    "adapters: leave these layers out of the plan, or take a library that shards them (`docs/verify.md`, Adapters)."
)


def parameters_are_sharded(evidence: Evidence) -> CheckOutcome:
    """Check that no parameter is lost, some are smaller on each rank, and all shards make up full shapes. Exact."""
    if evidence.lost:
        return _parameters_lost(evidence)
    if evidence.topology.tp == 1:
        return CheckOutcome(not_compared={"parameters_are_sharded": "tp is 1: nothing to shard"})
    names = [name for name in evidence.initial if name in evidence.layouts]
    sharded = [name for name in names if not evidence.layouts[name].is_replicated]
    incomplete = [name for name in sharded if not _is_complete(evidence, name)]
    margins = dict.fromkeys(names, 0.0)
    if not sharded:
        details: dict[str, object] = {"count_total": len(names), "advice": _ADVICE}
        return CheckOutcome(margins, (_sharding_suspect(evidence, len(names), details),))
    if not incomplete:
        return CheckOutcome(margins)
    first, *others = incomplete
    details = {"count_differing": len(incomplete), "count_total": len(sharded), "also": others}
    suspect = _sharding_suspect(evidence, len(incomplete), details, parameter=first)
    return CheckOutcome(margins, (replace(suspect, shards=_shard_facts(evidence, first)),))


def _parameters_lost(evidence: Evidence) -> CheckOutcome:
    first, *others = evidence.lost
    details = {
        "count_differing": len(evidence.lost),
        "count_total": len(evidence.initial),
        "counted": ("parameter", "is missing", "are missing"),
        "advice": _ADVICE_LOST,
        "also": others,
    }
    suspect = _sharding_suspect(evidence, len(evidence.lost), details, parameter=first)
    margins = dict.fromkeys(evidence.initial, 0.0) | dict.fromkeys(evidence.lost, inf)
    return CheckOutcome(margins, (replace(suspect, kind="lost"),))


def _is_complete(evidence: Evidence, name: str) -> bool:
    layout = evidence.layouts[name]
    num_elements = sum(prod(shape) for shape in layout.local_shapes)
    return tuple(layout.shape) == tuple(evidence.initial[name].shape) and num_elements >= prod(layout.shape)


def _shard_facts(evidence: Evidence, name: str) -> ShardFacts | None:
    """Return the sizes of a parameter and its shards along the dim that is cut; None where several or none are."""
    layout, full_shape = evidence.layouts[name], tuple(evidence.initial[name].shape)
    for dim, size in enumerate(full_shape):
        shards = tuple(shape[dim] for shape in layout.local_shapes)
        is_cut = all(shard < size for shard in shards)
        if is_cut and len(layout.shape) == len(full_shape) and (layout.shape[dim] != size or sum(shards) != size):
            return ShardFacts(dim, size, shards)
    return None


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
    """Compare every parameter's shards with the reference's parameter. Exact."""
    compared, not_compared = compare_parameters(
        evidence, evidence.initial, evidence.initial_parts, lambda name, expected: 0.0
    )
    wrong = [parameter for parameter in compared.values() if not parameter.difference.agrees]
    suspects = tuple(_weight_suspect(evidence, parameter, compared, len(wrong)) for parameter in wrong)
    margins = {name: parameter.difference.margin for name, parameter in compared.items()}
    return CheckOutcome(margins, suspects, not_compared)


def _weight_suspect(
    evidence: Evidence, parameter: ComparedParameter, compared: Mapping[str, ComparedParameter], num_wrong: int
) -> Suspect:
    details = {"first_of": num_wrong}
    where = {"phase": "start"}
    suspect = parameter_suspect(evidence, parameter, check=_CHECK, kind="weight", where=where, details=details)
    layout, parent = evidence.layouts[parameter.name], _parent(parameter)
    others = [other for other in compared.values() if other.name != parameter.name]
    siblings = [other for other in others if _parent(other) == parent]
    right, wrong = (
        tuple(other.name for other in siblings if other.difference.agrees is agrees) for agrees in (True, False)
    )
    is_complete = [tuple(part.shape) for part in parameter.actual_parts] == list(layout.local_shapes)
    return replace(
        suspect,
        actual=layout.assemble(parameter.actual_parts) if is_complete and not layout.is_replicated else None,
        others={other.name: (other.expected, *other.expected_parts) for other in others if other.expected_parts},
        siblings=SiblingWeights(wrong, right) if wrong and right else None,
    )


def _parent(parameter: ComparedParameter) -> str:
    """Return the parent of the module that has the parameter."""
    return parameter.module.rpartition(".")[0]
