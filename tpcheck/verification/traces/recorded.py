"""What one rank has recorded."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.adapters import Layout
from tpcheck.records import Step
from tpcheck.topology import Topology

Tensor = Any


@dataclass(frozen=True, slots=True)
class Recorded:
    """One rank's part of a trace.

    Attributes:
        rank: Its global rank.
        topology: Of the world that was recorded.
        dtype: Name of the dtype of the parameters.
        initial: Its parameters before the first step.
        buffers: Names of its buffers.
        layouts: How its parameters lie over the TP group, as far as their layers tell.
        steps: One for each call of the model; weights are those after the optimizer's step, empty where there was none.
        inputs: What the model was given, by step: floating-point and integer tensors by their path.
        deviations: How far each tensor moves in perturbed replays, where the whole model was at hand to be replayed.
        versions: Of the packages.
    """

    rank: int
    topology: Topology
    dtype: str
    initial: Mapping[str, Tensor]
    buffers: tuple[str, ...]
    layouts: Mapping[str, Layout]
    steps: tuple[Step, ...]
    inputs: tuple[Mapping[str, Tensor], ...]
    deviations: Mapping[Hashable, float] | None
    versions: Mapping[str, str]
