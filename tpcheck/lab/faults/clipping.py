"""Clipping that also scales gradients of a small norm up, as some trainers do, and mistakes in it."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.core.clipping import TORCH_EPSILON
from tpcheck.lab.faults.hand_written import HandWrittenControl, HandWrittenFault
from tpcheck.lab.faults.hand_written_model import inside
from tpcheck.lab.faults.losses import WHOLE, Vocabulary, over_the_ranks


def small_loss(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Return a hundredth of the cross entropy: the norm of its gradient is far below 1."""
    return vocabulary.negative_log_likelihood(logits_BLV, labels_BL).mean() / 100


def _squares(parameters: Sequence[Tensor], *, sharded: bool) -> Tensor:
    return torch.stack(
        [
            parameter.grad.square().sum()
            for parameter in parameters
            if parameter.grad is not None and hasattr(parameter, "tensor_model_parallel") is sharded
        ]
    ).sum()


def _scale(parameters: Sequence[Tensor], factor: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _whole_norm(parameters: Sequence[Tensor]) -> float:
    """Return the norm over a TP group that is the world."""
    squares = _squares(parameters, sharded=True)
    dist.all_reduce(squares)
    return sqrt(float(squares + _squares(parameters, sharded=False)))


def scaled_to_norm(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Give the gradients this norm, whichever they have."""
    norm = _whole_norm(parameters)
    _scale(parameters, max_norm / norm)
    return norm


def clipped_without_epsilon(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Clip as torch does, without adding 1e-6 to the norm."""
    norm = _whole_norm(parameters)
    _scale(parameters, min(1.0, max_norm / norm))
    return norm


def _clipped_apart(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Clip vectors and matrices each by their own norm; report that of all."""
    norm = _whole_norm(parameters)
    for is_vector in (True, False):
        group = [parameter for parameter in parameters if (parameter.dim() < 2) is is_vector]
        _scale(group, min(1.0, max_norm / (_whole_norm(group) + TORCH_EPSILON)))
    return norm


def _scaled_by_own_norm(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale by the norm of what this rank has; report the right one."""
    norm = _whole_norm(parameters)
    own = sqrt(float(_squares(parameters, sharded=True) + _squares(parameters, sharded=False)))
    _scale(parameters, max_norm / (own + TORCH_EPSILON))
    return norm


_LOSS = {"loss": small_loss}
_NOISE = {"key_bias": True}

FAULTS = (
    HandWrittenFault("scaled_up_by_own_norm", "small gradients are scaled up by the norm of each rank's own",
                     over_the_ranks, (), ("norm_is_local", None), checks=("updates_match_reference",), options=_LOSS,
                     clip=_scaled_by_own_norm, kind="losses"),
    HandWrittenFault("vectors_clipped_apart", "vectors and matrices are clipped each by their own norm, beside a "
                     "parameter whose gradient is noise", inside, (), ("clipped_per_group",),
                     checks=("updates_match_reference",), options=_NOISE, clip=_clipped_apart, kind="losses"),
)  # fmt: skip

CONTROLS = (
    HandWrittenControl(inside, _LOSS, also=over_the_ranks, clip=scaled_to_norm),
    HandWrittenControl(inside, _NOISE, clip=clipped_without_epsilon),
)
