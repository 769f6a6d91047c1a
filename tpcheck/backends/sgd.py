"""The optimizer of backends that bring none: SGD on the weights, or on float32 masters of low-precision weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tpcheck.backends.protocols import TrainingOptions

Parameters = Sequence[torch.Tensor]
Clip = Callable[[Parameters, float], Any]  # parameters, largest norm -> the norm they had

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class Sgd:
    """Clips by what `clip` finds, steps, and writes masters back; a parameter may be a DTensor."""

    def __init__(self, parameters: Parameters, options: TrainingOptions, clip: Clip | None) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._masters = [_master(parameter) for parameter in self._parameters]
        self._clip = clip
        self._max_norm = options.max_grad_norm
        self.optimizer = torch.optim.SGD(
            self._masters,
            lr=options.learning_rate,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            foreach=False,  # its kernels take no mixture of DTensors and plain tensors
        )

    def step(self) -> float | None:
        """Clip, take one step from the parameters' gradients, clear them, and return the norm they had."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        norm = None if self._clip is None else float(self._clip(self._masters, self._max_norm))
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.grad = None
                if master is not parameter:
                    parameter.copy_(master)
        return norm


def _master(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to(torch.float32) if parameter.dtype in _LOW_PRECISION else parameter
