"""What a backend may offer beside sharding a model, for those that search it for mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        plain: What it replaces: `linear`, `embedding`, or `transposed_linear` (a weight of in x out, as in GPT-2).
        input: Whether each rank is given the whole input or its part of the last dim.
        output: Whether each rank returns the whole output or its part of the last dim.
        shard: Returns the layer of this rank, made of a plain one of its own. Collective over the TP group.
        blocks: How many parts of equal size the weight is fused of; its width is a multiple.
        why_not: It is not run, for this reason.
    """

    name: str
    plain: Plain = "linear"
    input: Held = "whole"
    output: Held = "whole"
    shard: Callable[[nn.Module, RankLike], nn.Module] | None = None
    blocks: int = 1
    why_not: str = ""


@runtime_checkable
class OffersLayers(Protocol):
    """A backend whose layers can be tried one by one."""

    def parallel_layers(self) -> Sequence[ParallelLayer]:
        """Return every kind of layer that the installed version has."""

    def layer_options(self) -> Mapping[str, tuple[Any, ...]]:
        """Return settings of all layers, and the values that each may have, the default first."""

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what this rank holds of a parameter or output."""
