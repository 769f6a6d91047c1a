"""Faults of the norm that clips: local, counting replicas, or not used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Live
from tpcheck.lab.faults.injection import everywhere, optimizer_fault

_NORM = ("gradient_norm_matches_reference",)
_UPDATE = ("updates_match_reference",)

_TP4 = Topology(tp=4)
_DP2 = Topology(tp=2, dp=2)

Clip = Callable[..., Tensor]


def _replace_clipping(change: Callable[[Clip], Clip]) -> None:
    """Replace the clipping of an engine without ZeRO; a rank is a process of its own, so nothing is left behind."""
    from deepspeed.runtime import engine

    engine.clip_grad_norm_ = change(engine.clip_grad_norm_)


def _norm_of_own_gradients(live: Live) -> None:
    def local(clip: Clip) -> Clip:
        return lambda parameters, max_norm, norm_type=2, mpu=None: clip(parameters, max_norm, norm_type, None)

    _replace_clipping(local)


def _norm_not_reduced_under_zero(live: Live) -> None:
    live.candidate.engine.optimizer._model_parallel_all_reduce = lambda tensor, op: None


def _norm_counts_replicas(live: Live) -> None:
    from deepspeed.runtime import utils

    utils.is_model_parallel_parameter = lambda parameter: True


def _norm_counts_replicas_under_zero(live: Live) -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    stage_1_and_2.is_model_parallel_parameter = lambda parameter: True


def _gradients_of(parameters: Iterable[Any]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _clipped_per_rank(live: Live) -> None:
    def change(clip: Clip) -> Clip:
        def clipped(parameters: Iterable[Any], max_norm: float, **options: Any) -> Tensor:
            listed = list(parameters)
            kept = [gradient.clone() for gradient in _gradients_of(listed)]
            norm = clip(listed, max_norm, **options)
            own = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in kept])))
            for gradient, whole in zip(_gradients_of(listed), kept, strict=True):
                gradient.copy_(whole * min(1.0, max_norm / (own + 1e-6)))
            return norm

        return clipped

    _replace_clipping(change)


def _never_clipped(live: Live) -> None:
    def change(clip: Clip) -> Clip:
        def measured(parameters: Iterable[Any], max_norm: float, **options: Any) -> Tensor:
            listed = list(parameters)
            kept = [gradient.clone() for gradient in _gradients_of(listed)]
            norm = clip(listed, max_norm, **options)
            for gradient, whole in zip(_gradients_of(listed), kept, strict=True):
                gradient.copy_(whole)
            return norm

        return measured

    _replace_clipping(change)


FAULTS = (
    optimizer_fault(
        "norm_of_own_gradients",
        "each rank clips by the norm of its own gradients",
        everywhere(_norm_of_own_gradients),
        checks=_NORM,
        causes=("norm_is_local",),
        link="https://github.com/deepspeedai/DeepSpeed/pull/5411",
    ),
    optimizer_fault(
        "norm_not_reduced_under_zero",
        "under ZeRO the norm is not summed over the TP group",
        everywhere(_norm_not_reduced_under_zero),
        checks=_NORM,
        causes=("norm_is_local",),
        topology=_DP2,
        zero_stage=2,
    ),
    optimizer_fault(
        "norm_counts_replicas",
        "replicated parameters are counted once for each rank in the norm",
        everywhere(_norm_counts_replicas),
        checks=_NORM,
        causes=("norm_counts_replicas",),
        link="https://github.com/NVIDIA-NeMo/RL/pull/3788",
        topology=_TP4,
    ),
    optimizer_fault(
        "norm_counts_replicas_under_zero",
        "under ZeRO replicated parameters are counted once for each rank in the norm",
        everywhere(_norm_counts_replicas_under_zero),
        checks=_NORM,
        causes=("norm_counts_replicas",),
        link="https://github.com/ROCm/TransformerEngine/pull/715",
        topology=_DP2,
        zero_stage=1,
    ),
    optimizer_fault(
        "clipped_per_rank",
        "the norm is right, but each rank clips by that of its own gradients",
        everywhere(_clipped_per_rank),
        checks=_UPDATE,
        causes=("norm_is_local",),
    ),
    optimizer_fault(
        "never_clipped",
        "the norm is right, but no gradient is clipped",
        everywhere(_never_clipped),
        checks=_UPDATE,
        causes=(None,),
        link="https://github.com/huggingface/transformers/pull/46113",
    ),
)
