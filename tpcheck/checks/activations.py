"""Compares what entered and left every module, and the gradients of that, with the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tpcheck.compare import Difference, Placed, compare_placed, frobenius_distance, place, spacing
from tpcheck.placement import Partial, Placement, Replicate, Shard
from tpcheck.records import Evidence, TensorKey
from tpcheck.records.trace import Phase


@dataclass(frozen=True, slots=True)
class ComparedActivation:
    """One activation on both sides, and how far they are apart."""

    key: TensorKey
    expected: Any
    placed: Placed
    found: Difference


@dataclass(frozen=True, slots=True)
class ComparedActivations:
    """All activations of one phase of one step, in the reference's order of events."""

    compared: Mapping[TensorKey, ComparedActivation]
    missed: Mapping[str, str]

    def wrong(self) -> list[ComparedActivation]:
        return [one for one in self.compared.values() if not one.found.agrees]

    def margins(self) -> dict[str, float]:
        return {str(key): one.found.margin for key, one in self.compared.items()}


def compare_activations(evidence: Evidence, step: int, phase: Phase) -> ComparedActivations:
    """Compare every activation of a phase by the placement that it really has."""
    compared: dict[TensorKey, ComparedActivation] = {}
    missed: dict[str, str] = {}
    candidates = [part.activations for part in evidence.candidate[step]]
    for key, expected in evidence.reference[step].activations.items():
        if key.phase != phase:
            continue
        parts = [activations[key] for activations in candidates if key in activations]
        if len(parts) < len(candidates):
            missed[str(key)] = "not seen on every rank of the sharded model"
            continue
        placed = place(expected.shape, parts, _weight_hint(evidence, key))
        if placed is None:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            missed[str(key)] = f"the ranks' shapes {shapes} do not make up {tuple(expected.shape)}"
            continue
        allowed = evidence.tolerance.allowed((step, evidence.dp_rank, key), spacing(expected))
        compared[key] = ComparedActivation(key, expected, placed, compare_placed(placed, expected, allowed))
    return ComparedActivations(_with_partials(compared), missed)


def _weight_hint(evidence: Evidence, key: TensorKey) -> Placement | None:
    """Return how the module's weight, [out, in], cuts the features of this activation."""
    layout = evidence.layouts.get(f"{key.module}.weight")
    placement = layout.placement() if layout is not None else None
    features = 0 if key.role == "output" else 1
    return placement if isinstance(placement, Shard) and placement.dim == features else None


def _with_partials(compared: dict[TensorKey, ComparedActivation]) -> dict[TensorKey, ComparedActivation]:
    """Accept terms of a sum where the module around them has the right sum.

    A module may leave its reduction to the one that calls it (experts, an input gradient); the ranks' terms must add
    up, and the enclosing module must agree.
    """
    result = dict(compared)
    for key, one in compared.items():
        if one.found.agrees or len(one.placed.parts) < 2 or not isinstance(one.placed.placement, Replicate):
            continue
        around = _enclosing(compared, key)
        error = frobenius_distance(torch.stack(one.placed.parts).sum(dim=0), one.expected)
        if around is not None and around.found.agrees and error <= one.found.allowed:
            placed = Placed(Partial(), one.placed.parts)
            found = replace(one.found, error=error, part_errors=(0.0,) * len(placed.parts), largest=0.0)
            result[key] = replace(one, placed=placed, found=found)
    return result


def _enclosing(compared: Mapping[TensorKey, ComparedActivation], key: TensorKey) -> ComparedActivation | None:
    """Return the same role of the nearest module around `key` that was compared."""
    module = key.module
    while module:
        module = module.rpartition(".")[0]
        for path in dict.fromkeys((key.path, "0")):
            around = compared.get(replace(key, module=module, path=path))
            if around is not None:
                return around
    return None
