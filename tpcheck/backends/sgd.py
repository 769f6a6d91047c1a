"""An optimizer of the weights, or of float32 masters of low-precision weights: the reference's, and most backends'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.local_part import full_tensor
from tpcheck.backends.optimizer import make_optimizer
from tpcheck.core.clipping import Clipping

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
    if clipping.is_torchs:
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
        options: The optimizer (SGD by default), its schedule, and the largest norm.
        clip: Clips the gradients of the masters and returns their norm. None: no clipping, and no norm.
        decays: Whether the weights of each parameter that needs a gradient decay; None for all.
        names: Of these parameters, for an optimizer that asks for them.
    """

    def __init__(
        self,
        parameters: Parameters,
        options: TrainingOptions,
        clip: Clip | None,
        decays: Sequence[bool] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._masters = [
            _master_of(parameter) if parameter.dtype in LOW_PRECISION and options.masters else parameter
            for parameter in self._parameters
        ]
        self._masters_by_id = dict(zip(map(id, self._parameters), self._masters, strict=True))
        self._clip = clip
        self._max_norm = options.max_grad_norm
        self.optimizer = make_optimizer(options, self._masters, decays, names)
        self._schedule = None if options.schedule is None else options.schedule(self.optimizer)

    @property
    def has_masters(self) -> bool:
        """Whether what it steps are masters of its own, which no library saves."""
        return any(master is not parameter for parameter, master in zip(self._parameters, self._masters, strict=True))

    @property
    def learning_rate(self) -> float:
        """The rate of the next step; nan where an optimizer of the user's keeps none in its first group."""
        return float(self.optimizer.param_groups[0].get("lr", nan))

    def step(self, scale: float = 1.0) -> float | None:
        """Clip, take one step from the parameters' gradients, clear them, and return the norm before clipping.

        Args:
            scale: What masters' gradients are divided by first: that of the losses.
        """
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype) / scale
        norm = None if self._clip is None else float(self._clip(self._masters, self._max_norm))
        self.optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.grad = None
                if master is not parameter:
                    parameter.copy_(master)
        return norm

    def state(self, parameter: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return what has an element for each of the parameter's: moments, and `master` where there is one."""
        master = self._masters_by_id.get(id(parameter))
        if master is None:
            return {}
        states = {} if master is parameter else {"master": master.detach()}
        return {**states, **states_like(master, self.optimizer)}


def _master_of(parameter: torch.Tensor) -> torch.Tensor:
    """Return a float32 copy with the parameter's attributes, by which code that clips and steps knows shards."""
    master = parameter.detach().to(torch.float32)
    vars(master).update(vars(parameter))
    return master


def states_like(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's states of a parameter that have its shape: no step counts, no factors of a moment."""
    return {
        name: value.detach()
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim()
    }
