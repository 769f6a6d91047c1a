"""Which collectives a module issued, and which it should have: those that its like issues elsewhere in the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tpcheck.records import Evidence
from tpcheck.records.step import Collective

Issued = tuple[tuple[str, tuple[int, ...]], ...]  # (name, global ranks) in order


def unlike_its_kind(evidence: Evidence, step: int, module: str) -> dict[str, Any]:
    """Return what a module issued on the ranks, where that is not what most modules of its kind issued; else nothing.

    Modules are of one kind if their names differ in the number of the layer alone.
    """
    by_rank = [_by_module(part.collectives) for part in evidence.candidate[step]]
    own = [issued.get(module, ()) for issued in by_rank]
    names = {key.module for key in evidence.reference[step].activations}
    like = sorted(name for name in names if name != module and _kind(name) == _kind(module))
    votes = Counter(issued.get(name, ()) for name in like for issued in by_rank)
    if votes:
        expected = votes.most_common(1)[0][0]
        as_in = "in " + next(name for name in like if any(issued.get(name, ()) == expected for issued in by_rank))
    else:
        expected = Counter(own).most_common(1)[0][0]
        as_in = "on the other ranks"
    if all(issued == expected for issued in own):
        return {}
    different = next(issued for issued in own if issued != expected)
    return {"collectives": _told(different), "collectives_expected": _told(expected), "collectives_as_in": as_in}


def _by_module(collectives: tuple[Collective, ...]) -> Mapping[str, Issued]:
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for one in collectives:
        found.setdefault(one.module, []).append((one.name, one.ranks))
    return {module: tuple(issued) for module, issued in found.items()}


def _told(issued: Issued) -> list[dict[str, Any]]:
    return [{"name": name, "ranks": list(ranks)} for name, ranks in issued]


def _kind(module: str) -> str:
    return re.sub(r"\d+", "#", module)
