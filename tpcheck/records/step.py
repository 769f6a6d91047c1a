"""What one training step made: the tensors that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpcheck.records.trace import TensorKey

Tensor = Any  # a torch.Tensor; this layer does not import torch


@dataclass(frozen=True, slots=True)
class Step:
    """One training step as one rank, or the reference for one DP rank, saw it.

    Attributes:
        activations: What entered and left every module and the gradients of that, in the order of events.
        gradients: Gradient of each parameter before clipping, averaged over DP; None where there is none.
        weights: Each parameter after the optimizer's step.
        buffers: Each buffer after this DP rank's batch.
        gradient_norm: The norm by which the step clipped; None where it is not known.
        loss: The loss of this DP rank's batch.
        digests: Digest of the bits of each parameter, gradient and buffer, by (kind, name).
    """

    activations: Mapping[TensorKey, Tensor]
    gradients: Mapping[str, Tensor | None]
    weights: Mapping[str, Tensor]
    gradient_norm: float | None
    loss: float
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    digests: Mapping[tuple[str, str], str] = field(default_factory=dict)
