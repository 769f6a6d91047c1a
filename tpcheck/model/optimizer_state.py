"""Moments and float32 masters of both sides, by (state, parameter): each rank's TP shard, gathered over DP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tpcheck.backends.interface import Candidate, HoldsOptimizerState
from tpcheck.backends.sgd import Sgd

States = dict[tuple[str, str], torch.Tensor]


def optimizer_state(model: nn.Module, optimizer: Sgd) -> States:
    """Return copies of the reference's states that have an element for each of the parameter's."""
    return {
        (state, name): value.detach().clone()
        for name, parameter in model.named_parameters()
        for state, value in optimizer.state(parameter).items()
    }


def candidate_state(candidate: Candidate, names: Sequence[str]) -> States:
    """Return this rank's shards; nothing where the backend cannot give them. Collective over the DP group."""
    if not isinstance(candidate, HoldsOptimizerState):
        return {}
    return {(state, name): value for name in names for state, value in candidate.optimizer_state(name).items()}
