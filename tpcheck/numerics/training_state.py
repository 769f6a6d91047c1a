"""All that a training goes on from, as one rank holds it: weights, masters, moments, buffers, rates and counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from tpcheck.numerics.global_index import PADDING, GlobalIndex


@dataclass(frozen=True, slots=True)
class StateKey:
    """The name of a tensor of a training's state.

    Attributes:
        kind: `weight`, `master`, `state` or `buffer`.
        name: Of the parameter or buffer.
        state: Of the optimizer's state, such as `exp_avg`; else empty.
    """

    kind: str
    name: str
    state: str = ""

    @property
    def what(self) -> str:
        """What it is of the parameter or buffer."""
        return self.state if self.kind == "state" else self.kind


@dataclass(frozen=True, slots=True)
class StateTensor:
    """This rank's elements of one tensor.

    Attributes:
        values: A copy, on the CPU.
        index: Which elements of the whole tensor they are; None where that is unknown.
    """

    values: torch.Tensor
    index: GlobalIndex | None


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What one rank holds between two steps.

    Attributes:
        tensors: By name.
        numbers: Rates, betas and counters, by name.
        generators: Digests of the states of random generators, by name.
        loss: Of the step before; None before the first.
        batches: Digests of the micro-batches of the step before, where a loop has loaded them itself.
    """

    tensors: Mapping[StateKey, StateTensor]
    numbers: Mapping[str, Any]
    generators: Mapping[str, str]
    loss: float | None = None
    batches: tuple[str, ...] = ()


def assemble(states: Sequence[TrainingState]) -> dict[StateKey, torch.Tensor]:
    """Return the whole tensors that the ranks hold parts of.

    Tensors are left out of which some elements are on no rank, or of which a rank does not know its elements.

    Args:
        states: Of all ranks.
    """
    parts: dict[StateKey, list[StateTensor]] = {}
    for state in states:
        for key, tensor in state.tensors.items():
            parts.setdefault(key, []).append(tensor)
    wholes = {key: _whole(of_key) for key, of_key in parts.items()}
    return {key: whole for key, whole in wholes.items() if whole is not None}


def _whole(parts: Sequence[StateTensor]) -> torch.Tensor | None:
    indices = [part.index for part in parts if part.index is not None]
    if len(indices) < len(parts):
        return None
    shape = indices[0].shape
    whole = torch.zeros(prod(shape), dtype=parts[0].values.dtype)
    is_known = torch.zeros(prod(shape), dtype=torch.bool)
    for part, index in zip(parts, indices, strict=True):
        positions = index.positions_of(*index.present)
        is_present = positions != PADDING
        whole[positions[is_present]] = part.values.reshape(-1)[is_present]
        is_known[positions[is_present]] = True
    return whole.reshape(shape) if bool(is_known.all()) else None
