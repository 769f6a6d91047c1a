"""What error is allowed: ten times what rounding alone did to the same tensor in the same run.

Measured on llama, qwen2 and gemma2 under DeepSpeed 0.19.8, tp 2, in float64, float32 and bfloat16: the real difference
between sharded and unsharded arithmetic is 0.2 to 1.0 times the largest deviation among eight perturbed replays, so
ten times that deviation leaves clean margins near 0.1 and no constant per dtype.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

NUM_REPLAYS = 8
SAFETY = 10.0


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Allowed absolute Frobenius error by tensor.

    Attributes:
        scalar_eps: Machine epsilon of the loss and the gradient norm, which low-precision runs keep in float32.
        num_replays: How many perturbed replays were measured.
        deviations: Largest Frobenius deviation of each tensor over the replays.
    """

    scalar_eps: float
    num_replays: int
    deviations: Mapping[Hashable, float]

    def allowed(self, key: Hashable, rounding: float) -> float:
        """Return the largest Frobenius error of this tensor that passes.

        Args:
            key: Which tensor.
            rounding: What rounding does to the expected tensor itself, however still the replays stood: for computed
                tensors that of every element, for stored ones (weights) that of one.
        """
        return SAFETY * max(self.deviations.get(key, 0.0), rounding)

    def allowed_scalar(self, key: Hashable, expected: float) -> float:
        """Return the largest error that passes for the loss or the gradient norm.

        Each ends a long sum, whose last addition rounds once and whose division or root rounds once more.
        """
        return self.allowed(key, 2 * self.scalar_eps * abs(expected))


def largest_deviations(measured: list[Mapping[Hashable, float]]) -> dict[Hashable, float]:
    """Return the largest deviation of each tensor over several sets of replays."""
    largest: dict[Hashable, float] = {}
    for deviations in measured:
        for key, deviation in deviations.items():
            largest[key] = max(deviation, largest.get(key, 0.0))
    return largest
