"""The reference's optimizer: SGD on the weights, or on float32 masters of low-precision weights."""

from __future__ import annotations

import torch
from torch import nn

from tpcheck.adapters import TrainingOptions

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_ and in DeepSpeed


class ReferenceOptimizer:
    """Clips by the norm of all gradients, steps, and writes masters back, as mixed-precision trainers do."""

    def __init__(self, model: nn.Module, options: TrainingOptions) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._masters = [_master(parameter) for parameter in self._parameters]
        self._max_norm = options.max_grad_norm
        self._sgd = torch.optim.SGD(
            self._masters,
            lr=options.learning_rate,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )

    def step(self) -> float:
        """Take one step from the parameters' gradients, clear them, and return the norm they had."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        gradients = [master.grad for master in self._masters if master.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
        if self._max_norm > 0:
            coefficient = torch.clamp(self._max_norm / (norm + _CLIP_EPSILON), max=1.0)
            for gradient in gradients:
                gradient.mul_(coefficient)
        self._sgd.step()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            parameter.grad = None
            if master is not parameter:
                parameter.data.copy_(master.data)
        return float(norm)


def _master(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to(torch.float32) if parameter.dtype in _LOW_PRECISION else parameter
