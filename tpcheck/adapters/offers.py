"""What a backend may offer beside sharding a model, for those that search it for mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from tpcheck.adapters.protocols import RankLike

Held = Literal["whole", "part"]
Plain = Literal["linear", "embedding", "transposed_linear"]


@runtime_checkable
class OffersOptions(Protocol):
    """A backend with options that change how it trains, and must not change what comes of it."""

    def options(self) -> Sequence[Mapping[str, Any]]:
        """Return pieces of configuration, of which any number may be merged."""


@dataclass(frozen=True, slots=True)
class ParallelLayer:
    """One kind of tensor-parallel layer.

    Attributes:
        name: What the backend calls it.
        plain: What it replaces: `linear`, `embedding`, or `transposed_linear` (a weight of inputs x outputs,
            as in GPT-2).
        input: Whether each rank is given the whole input or its part of the last dim.
        output: Whether each rank returns the whole output or its part of the last dim.
        shard: Returns this rank's layer, made of a plain one of its own. Collective over the TP group. None where the
            layer is not tried.
        out_blocks, in_blocks: How many parts of one size the weight's outputs and inputs are fused of.
        why_not: Why it is not tried.
    """

    name: str
    plain: Plain = "linear"
    input: Held = "whole"
    output: Held = "whole"
    shard: Callable[[nn.Module, RankLike], nn.Module] | None = None
    out_blocks: int = 1
    in_blocks: int = 1
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Every kind of layer that an installed backend has, and how to try one.

    Attributes:
        layers: The kinds.
        options: Settings that all of them share, and the values that each may have, the usual one first.
        session: Returns a context in which layers can be made and run under such settings.
        local: Returns what this rank holds of a parameter or an output; of a gradient, what lies as its parameter, the
            second argument, lies.
    """

    layers: Sequence[ParallelLayer]
    options: Mapping[str, tuple[Any, ...]]
    session: Callable[[Mapping[str, Any]], AbstractContextManager[None]]
    local: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@runtime_checkable
class OffersLayers(Protocol):
    """A backend whose layers can be tried one by one."""

    def layer_table(self) -> LayerTable:
        """Return the layers of the installed version."""


def plain_tensor(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return the tensor: `LayerTable.local` where each rank's tensors are plain ones."""
    return tensor.detach()
