"""SGD on the weights, or on float32 masters of low-precision weights: the reference's, and that of most backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.local_part import full_tensor
from tpcheck.core.clipping import NO_CLIPPING, Clipping

Parameters = Sequence[torch.Tensor]
Clip = Callable[[Parameters, float], Any]  # parameters, largest norm -> the norm before clipping

LOW_PRECISION = (torch.bfloat16, torch.float16)


def clip_gradients(parameters: Parameters, max_norm: float) -> float:
    """Clip as `torch.nn.utils.clip_grad_norm_` does, unless `max_norm` is 0; return the norm before clipping."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return float(full_tensor(norm))


def clip_by_convention(clipping: Clipping) -> Clip:
    """Return what clips as `clipping` says: torch's own where that is its convention."""
    if replace(clipping, max_norm=0.0) == NO_CLIPPING:
        return clip_gradients

    def clip(parameters: Parameters, max_norm: float) -> float:
        norm = clip_gradients(parameters, 0.0)
        factor = replace(clipping, max_norm=max_norm).factor(norm)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return norm

    return clip


class Sgd:
    """Clips by `clip`, steps, and copies masters to the parameters, as mixed-precision trainers do.

    Args:
        parameters: What it steps; any may be a DTensor, and those that need no gradient are left alone.
        options: Learning rate, momentum, weight decay and the largest norm.
        clip: Clips the gradients of the masters and returns their norm. None: no clipping, and no norm.
    """

    def __init__(self, parameters: Parameters, options: TrainingOptions, clip: Clip | None) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._masters = [
            parameter.detach().to(torch.float32) if parameter.dtype in LOW_PRECISION else parameter
            for parameter in self._parameters
        ]
        self._clip = clip
        self._max_norm = options.max_grad_norm
        self.optimizer = torch.optim.SGD(
            self._masters,
            lr=options.learning_rate,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            foreach=False,  # its kernels refuse a mixture of DTensors and plain tensors
        )

    def step(self) -> float | None:
        """Clip, take one step from the parameters' gradients, clear them, and return the norm before clipping."""
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
