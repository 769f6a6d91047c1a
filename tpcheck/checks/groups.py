"""Do the live process groups stand where the topology says?"""

from __future__ import annotations

from tpcheck.checks.outcome import CheckOutcome
from tpcheck.records import Evidence, Suspect


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
