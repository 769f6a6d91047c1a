"""What one training step made: the tensors that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpcheck.records.trace import TensorKey

Tensor = Any  # a torch.Tensor; this layer does not import torch


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that a rank took part in.

    Attributes:
        module: The innermost module whose forward issued it.
        name: As in `torch.distributed`, such as `all_reduce`.
        ranks: Global ranks of its group; empty where they cannot be told.
    """

    module: str
    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One training step as one rank, or the reference for one DP rank, saw it.

    Attributes:
        activations: What entered and left every module and the gradients of that, in the order of events.
        gradients: Gradient of each parameter before clipping, averaged over DP; None where there is none.
        weights: Each parameter after the optimizer's step; empty where no optimizer step followed.
        buffers: Each buffer after this DP rank's batch.
        gradient_norm: The norm by which the step clipped; None where it is not known.
        loss: The loss of this DP rank's batch.
        own_gradients: Gradient of each parameter from this DP rank's batch alone; empty where there is one DP rank, and
            for a candidate.
        digests: Digest of the bits of each parameter, gradient and buffer, by (kind, name).
        collectives: Those of the forward pass, in order; the reference has none.
    """

    activations: Mapping[TensorKey, Tensor]
    gradients: Mapping[str, Tensor | None]
    weights: Mapping[str, Tensor]
    gradient_norm: float | None
    loss: float
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    own_gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    digests: Mapping[tuple[str, str], str] = field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()
