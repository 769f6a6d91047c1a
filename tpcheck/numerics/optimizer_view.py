"""What an optimizer gets and holds, by the parameter's name: gradients, weights, masters, moments, rates, norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from tpcheck.numerics.global_index import GlobalIndex


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """What an optimizer's step is governed by, for one of its groups.

    Attributes:
        optimizer: Its class, such as `AdamW`.
        options: `lr`, `betas`, `weight_decay` and whatever else is a number, text, bool, None or a tuple of these.
        parameters: Names of its parameters that this rank knows.
    """

    optimizer: str
    options: Mapping[str, Any]
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's elements of one tensor that belongs to a parameter, where they lie: detached, not copied.

    Attributes:
        kind: As in `TensorRecord`.
        name: Of the parameter, without wrappers.
        state: Name of an optimizer's state, such as `exp_avg`; else empty.
        values: The local elements: of the local shape, or flat where `index.fragment` says which.
        index: Where they are in the whole tensor; None where the layout is unknown.
        is_term: The values are a term of a sum over the TP group.
        scale: What to multiply the values by (1 / loss scale where gradients are still scaled).
        index_in_shard: Where the tensor is partitioned over DP (ZeRO, FSDP2) and its layout over TP is unknown: where
            the values are in this TP rank's tensor, which may be the whole one. `index` is then None.
    """

    kind: Literal["gradient", "accumulated", "weight", "master", "state"]
    name: str
    state: str
    values: torch.Tensor
    index: GlobalIndex | None
    is_term: bool = False
    scale: float = 1.0
    index_in_shard: GlobalIndex | None = None


class OptimizerView(Protocol):
    """One kind of optimizer around one model. Nothing here is collective."""

    @property
    def stepping(self) -> tuple[torch.optim.Optimizer, ...]:
        """The torch optimizers whose `step` ends a step of the loop (inside an engine: the inner one)."""
        ...

    @property
    def weights_follow_the_hook(self) -> bool:
        """Whether the model's weights change after the torch optimizer's step has ended.

        DeepSpeed and Megatron copy masters to weights, and gather these, after their inner optimizer's post hooks. Such
        weights are read when the model is called next, or the recording ends.
        """
        ...

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether this optimizer steps parameters of the model. One that does is in `stepping` from then on."""
        ...

    def gradients(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Part]:
        """Yield what the optimizer gets, when called from a hook before its step: reduced, accumulated, clipped.

        Args:
            optimizer: Only what this one is about to step. ZeRO steps its inner optimizer several times in one step of
                the loop, each time with other parameters (one group at stages 1 and 2, one sub-group at stage 3).
        """
        ...

    def weights(self) -> Iterator[Part]:
        """Yield every parameter that this rank holds a part of, frozen ones included."""
        ...

    def states(self) -> Iterator[Part]:
        """Yield float32 masters (kind `master`) and the tensors of the optimizer's state (kind `state`)."""
        ...

    def groups(self) -> tuple[ParameterGroup, ...]: ...

    def accumulated(self) -> Iterator[Part]:
        """Yield the gradients that are accumulated between two micro-batches; nothing where they cannot be seen."""
        ...

    def is_discarded(self) -> bool:
        """Return whether gradients of earlier backward passes are gone without a step: a scaler has skipped it."""
        ...

    def supports_replays(self) -> str:
        """Return why the model cannot be called outside the loop (ZeRO 3, FSDP2); empty where it can."""
        ...

    def reported_norm(self) -> float | None:
        """Return the gradient norm that the engine says it clipped by in the last step; None where it tells none."""
        ...

    def loss_scale(self) -> float: ...

    def num_skipped(self) -> int:
        """Return how many steps were skipped because of infinite gradients.

        No hook is called for those that an engine skips, but it is for a fused optimizer under a GradScaler.
        """
        ...

    def not_viewed(self) -> Mapping[str, str]:
        """Return why something cannot be seen, by parameter or kind."""
        ...
