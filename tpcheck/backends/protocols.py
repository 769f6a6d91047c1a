"""What a backend must offer to be verified, and what it may offer to those that search it for mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from tpcheck.backends.layout import Layout
from tpcheck.core.topology import Topology


class RankLike(Protocol):
    """What a backend may know of the rank it runs on."""

    @property
    def rank(self) -> int: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def device(self) -> torch.device: ...

    def group(self, axis: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How both sides train: SGD with momentum and weight decay, whose step shows a wrong scale of the gradient.

    Attributes:
        dtype: Dtype of the model's weights and arithmetic.
        zero_stage: ZeRO stage of the backend, 0 to 3.
        learning_rate, momentum, weight_decay: Of `torch.optim.SGD`.
        max_grad_norm: Gradients are clipped to this norm.
        batch_size: Samples that each DP rank sees in a step.
        config: The user's own backend configuration, merged over tpcheck's.
        ignore_plan: Drop the model's own tp_plan, so that the backend's heuristics shard it.
        rebuild: Makes the model once more, as the run made it; for backends whose models are cut as they are built.
    """

    dtype: torch.dtype
    zero_stage: int = 0
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    batch_size: int = 2
    config: Mapping[str, Any] = field(default_factory=dict)
    ignore_plan: bool = False
    rebuild: Callable[[], nn.Module] | None = None


class Candidate(Protocol):
    """A sharded model that trains; parameters and modules go by the names they had before sharding."""

    @property
    def module(self) -> nn.Module:
        """The sharded model, whose submodules bear the reference's names."""

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """Return the live groups that this rank uses on each axis, as global ranks, each distinct one once."""

    def layouts(self) -> Mapping[str, Layout]:
        """Return how each parameter lies over the TP group; without those that cannot be told. Collective over it."""

    def parameter(self, name: str) -> torch.Tensor:
        """Return a copy of this rank's TP shard, whole over DP. Collective over the DP group."""

    def gradient(self, name: str) -> torch.Tensor | None:
        """Return a copy of the gradient of this rank's TP shard, averaged over DP. Collective over the DP group."""

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model on this rank's batch and return what it returns."""

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass; `gradient` is valid from here to `step`."""

    def step(self) -> None:
        """Clip the gradients and step the optimizer."""

    def gradient_norm(self) -> float | None:
        """Return the norm by which the last step clipped, or None where the backend does not tell."""


@runtime_checkable
class SavesCheckpoints(Protocol):
    """What a candidate offers, too, if what it saves can be verified."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        """Return each public way to save the model: it writes into an empty folder. Collective over the world."""


@runtime_checkable
class TellsLayouts(Protocol):
    """What a backend offers, too, if it can read models that it has sharded in somebody else's program."""

    def layouts_of(self, model: nn.Module) -> Mapping[str, Layout]:
        """Return how the parameters of its own layers lie over the TP group. Collective over it."""


class Backend(Protocol):
    """Shards a model."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def versions(self) -> Mapping[str, str]:
        """Return the versions of the packages whose work is verified."""

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        """Return the training that `options.config` asks for, which both sides then do.

        Raises:
            UsageError: The configuration contradicts the other options, or asks for what the reference cannot do.
        """

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        """Return a context in which models of `options.dtype` can be built, sharded and trained on this machine.

        Collective over the world. The unsharded model is built and trained in it, too.
        """

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        """Shard `model` in place and make it trainable. Collective over the world."""


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
