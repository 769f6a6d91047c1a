"""Recordings made by hand: one linear layer, two calls, an optimizer step after the second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tpcheck import Topology
from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Shard
from tpcheck.numerics.evidence import Step, TensorKey
from tpcheck.runs.trace import RankRecording

OUTPUT = TensorKey("forward", "", 0, "output", "0")
WEIGHT = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
UPDATED = WEIGHT - 0.5


def step(weights: Mapping[str, torch.Tensor]) -> Step:
    return Step(
        {OUTPUT: WEIGHT.sum(dim=1)}, {"weight": WEIGHT * 2, "unused": None}, weights, None, 1.5, {"b": WEIGHT[0]}
    )


def recorded(rank: int = 0, tp: int = 1, dp: int = 1, **changes: Any) -> RankRecording:
    values: dict[str, Any] = {
        "rank": rank,
        "topology": Topology(tp=tp, dp=dp),
        "dtype": "float64",
        "initial": {"weight": WEIGHT},
        "buffers": ("b",),
        "layouts": {"weight": Layout.from_placement((4, 2), Shard(0), 2)} if tp == 2 else {},
        "steps": (step({}), step({"weight": UPDATED})),
        "inputs": ({"0": torch.ones(2)}, {"0": torch.zeros(2), "1.ids": torch.tensor([3])}),
        "deviations": {(0, 0, OUTPUT): 0.25, (1, "weight", "weight"): 0.5} if tp == 1 else None,
        "versions": {"torch": "2.13.0"},
    }
    return RankRecording(**{**values, **changes})
