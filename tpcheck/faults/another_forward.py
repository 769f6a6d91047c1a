"""Gives layers another forward pass, for faults of the collectives in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tpcheck.faults.fault import Draw, Live, ModelFault, Place, Planting

Forward = Callable[[Live, Any, int, Tensor], Tensor]  # the layer, the tp_rank that was drawn, its input


def instead(forward: Forward, *patterns: str) -> Callable[[Draw], Planting]:
    """Return what draws one of the layers and gives it another forward."""

    def drawn(draw: Draw) -> Planting:
        name, tp_rank = draw.module(*patterns), draw.tp_rank()

        def plant(live: Live) -> None:
            layer = live.module(name)
            layer.forward = lambda hidden: forward(live, layer, tp_rank, hidden)

        return Planting(plant, Place(modules=(name,)))

    return drawn


def collective_fault(
    name: str, what: str, draw: Callable[[Draw], Planting], causes: tuple[str | None, ...], **options: Any
) -> ModelFault:
    checks = ("outputs_match_reference",)
    return ModelFault(
        name, "forward collectives", what, draw, **{"checks": checks, "causes": causes, "steps": 1, **options}
    )
