"""Clipping by a norm: by what gradients are multiplied, in the conventions that trainers have."""

from __future__ import annotations

from dataclasses import dataclass

# torch, Megatron and DeepSpeed: max_norm / (norm + 1e-6), where that is below 1.
TORCH_EPSILON = 1e-6
# Of clipping of one's own: none, or a power of ten that keeps the quotient finite. A larger one changes training.
EPSILONS = (0.0, *(10.0**-exponent for exponent in range(16, 4, -1)))


@dataclass(frozen=True, slots=True)
class Clipping:
    """How gradients are clipped.

    Attributes:
        max_norm: The largest norm; 0 where nothing is clipped.
        epsilon: What is added to the norm before `max_norm` is divided by it.
        scales_up: Whether gradients of a smaller norm are scaled up to `max_norm`.

    Example:
        >>> Clipping(1.0, epsilon=0.0).factor(4.0)
        0.25
        >>> Clipping(1.0).factor(0.5), Clipping(1.0, 0.0, scales_up=True).factor(0.5)
        (1.0, 2.0)
    """

    max_norm: float = 0.0
    epsilon: float = TORCH_EPSILON
    scales_up: bool = False

    def factor(self, norm: float) -> float:
        """Return by what gradients of this norm are multiplied."""
        if self.max_norm <= 0 or norm + self.epsilon <= 0:
            return 1.0
        factor = self.max_norm / (norm + self.epsilon)
        return factor if self.scales_up else min(1.0, factor)

    def norm(self, factor: float) -> float:
        """Return the norm of gradients that are multiplied by `factor`; the largest such norm, where that is 1."""
        return self.max_norm / factor - self.epsilon

    @property
    def is_torchs(self) -> bool:
        """Whether this is what `torch.nn.utils.clip_grad_norm_` does."""
        return self.epsilon == TORCH_EPSILON and not self.scales_up

    def __str__(self) -> str:
        """Return it as a formula: `min(1, 1 / (norm + 1e-06))`."""
        norm = f"(norm + {self.epsilon:g})" if self.epsilon else "norm"
        quotient = f"{self.max_norm:g} / {norm}"
        return quotient if self.scales_up else f"min(1, {quotient})"


NO_CLIPPING = Clipping()
