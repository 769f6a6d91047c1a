"""Gradients of a small model on two ranks, as numbers: their norms, and the norm that is used in their place."""

from __future__ import annotations

from typing import Any

import torch

from tpcheck.core.clipping import Clipping
from tpcheck.numerics.evidence import NormFacts
from tpcheck.numerics.norms import ClippedStep, GradientNorms

LAYERS = ("layers.0", "layers.1")
REPLICATED = frozenset({*(f"{layer}.norm.weight" for layer in LAYERS), *(f"{layer}.down.bias" for layer in LAYERS)})
SHARDED = frozenset(
    {"embed.weight", "head.weight", *(f"{layer}.{name}.weight" for layer in LAYERS for name in ("q", "up", "down"))}
)
CLIPPING = Clipping(1.0)


def drawn(tp: int = 2, seed: int = 0) -> tuple[dict[str, torch.Tensor], ...]:
    """Return each rank's gradients."""
    generator = torch.Generator().manual_seed(seed)

    def parts(name: str) -> list[torch.Tensor]:
        of_ranks = torch.randn(tp, 3, 4, generator=generator, dtype=torch.float64)
        return [of_ranks[0] / 2] * tp if name in REPLICATED else list(of_ranks)

    gradients = {name: parts(name) for name in sorted(REPLICATED | SHARDED)}
    return tuple({name: of_ranks[rank] for name, of_ranks in gradients.items()} for rank in range(tp))


def norms_of(gradients: tuple[dict[str, torch.Tensor], ...]) -> GradientNorms:
    by_rank, sums, largest = (
        tuple(
            {name: float(torch.linalg.vector_norm(each, order)) for name, each in of_rank.items()}
            for of_rank in gradients
        )
        for order in (2, 1, torch.inf)
    )
    return GradientNorms(by_rank, REPLICATED, {1.0: sums, float("inf"): largest})


NORMS = norms_of(drawn())


def facts(*reported: float, norms: GradientNorms = NORMS, **fields: Any) -> NormFacts:
    """Return the facts of ranks that report these norms."""
    step = ClippedStep({}, CLIPPING, CLIPPING.factor(norms.whole))
    return NormFacts(norms, **{"expected": norms.whole, "reported": reported, "step": step, "noise": 1e-14, **fields})


def step(factors: dict[str, float | tuple[float, ...]], norms: GradientNorms = NORMS) -> ClippedStep:
    """Return a step that multiplied each parameter's gradient by a factor, one number for all ranks or one for each."""
    of_ranks = {name: each if isinstance(each, tuple) else (each,) * norms.tp for name, each in factors.items()}
    return ClippedStep(of_ranks, CLIPPING, CLIPPING.factor(norms.whole))


def clipped_alike(norm: float, norms: GradientNorms = NORMS) -> ClippedStep:
    """Return a step whose gradients are all clipped by one norm."""
    return step(dict.fromkeys(norms.names, CLIPPING.factor(norm)), norms)
