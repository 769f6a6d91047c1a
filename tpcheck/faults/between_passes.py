"""Rows of faults between the backward pass and the next forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpcheck.faults.fault import Draw, Live, ModelFault, Place, Planting


def optimizer_fault(name: str, what: str, draw: Callable[[Draw], Planting], **options: Any) -> ModelFault:
    return ModelFault(name, "norm and optimizer", what, draw, **options)


def everywhere(plant: Callable[[Live], None]) -> Callable[[Draw], Planting]:
    """Return what plants a fault of the whole run, which no draw changes."""
    return lambda draw: Planting(plant, Place())
