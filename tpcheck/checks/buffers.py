"""Compares the buffers after a step with the reference's for the same DP rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpcheck.compare import Difference, Placed, compare_placed, own_rounding, place
from tpcheck.records import Evidence


@dataclass(frozen=True, slots=True)
class ComparedBuffer:
    """One buffer on both sides, and how far they are apart."""

    name: str
    expected: Any
    placed: Placed
    found: Difference

    @property
    def label(self) -> str:
        return f"buffer {self.name}"


def compare_buffers(evidence: Evidence, step: int) -> tuple[list[ComparedBuffer], dict[str, str]]:
    """Return what could be compared, and why the rest could not, by label. Calibrated."""
    compared = []
    missed = {}
    for name, expected in evidence.reference[step].buffers.items():
        parts = [part.buffers[name] for part in evidence.candidate[step] if name in part.buffers]
        if len(parts) < len(evidence.candidate[step]):
            missed[f"buffer {name}"] = "the sharded model has no buffer of this name"
        elif any(part.shape != expected.shape for part in parts):
            missed[f"buffer {name}"] = "the sharded model's buffer has another shape"
        else:
            key = (step, evidence.dp_rank, "buffer", name)
            placed = place(expected.shape, parts)
            assert placed is not None  # equal shapes are replicas
            allowed = evidence.tolerance.allowed(key, own_rounding(expected))
            compared.append(ComparedBuffer(name, expected, placed, compare_placed(placed, expected, allowed)))
    return compared, missed
