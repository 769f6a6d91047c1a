"""Faults of replicas: weights, buffers and activations that should be the same on several ranks, and are not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.lab.faults.fault import TP2_DP2, TP4, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import after_step, restore_after_step, wrap_forward

_START = ("weights_match_reference", "replicas_agree")
_NORM = "*norm.weight"
_ROTARY = "model.rotary_emb"

_fault = fault_constructor("replicas", "updates_match_reference", "replicas_agree")


def _initialised_per_rank(draw: Draw) -> Injection:
    name, seed = draw.parameter(_NORM), draw.random.randrange(2**31)

    def inject(live: Live) -> None:
        generator = torch.Generator().manual_seed(seed + live.tp_rank)
        weight = live.parameter(name).data
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))

    return Injection(inject, Place(parameters=(name,)))


def _replicas_initialised_apart(draw: Draw) -> Injection:
    name = draw.parameter("*_proj.weight", _NORM)

    def inject(live: Live) -> None:
        if live.dp_rank == 1:
            live.parameter(name).data.mul_(1.01)

    return Injection(inject, Place(parameters=(name,)))


def _dropout_by_rank(live: Live, tp_rank: int, forward: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(live.tp_rank)
        return functional.dropout(forward(hidden), 0.1)


def _drift(live: Live, tp_rank: int, tensor: Callable[[], Tensor], is_due: Callable[[int], bool]) -> None:
    """Move a tensor by 1e-7 of its size on one rank, after the steps that are due."""

    def drift(step: int) -> None:
        if live.tp_rank == tp_rank and is_due(step):
            tensor().mul_(1 + 1e-7)

    after_step(live, drift)


def _buffer_drifts(draw: Draw) -> Injection:
    tp_rank = draw.tp_rank()

    def inject(live: Live) -> None:
        _drift(live, tp_rank, lambda: live.module(_ROTARY).inv_freq, lambda step: True)

    return Injection(inject, Place(modules=(_ROTARY,)))


def _drift_after_step_two(draw: Draw) -> Injection:
    name, tp_rank = draw.parameter(_NORM), draw.tp_rank()

    def inject(live: Live) -> None:
        _drift(live, tp_rank, lambda: live.parameter(name).data, lambda step: step == 1)

    return Injection(inject, Place(parameters=(name,)))


def _update_skipped(draw_names: Callable[[Draw], tuple[str, ...]]) -> Callable[[Draw], Injection]:
    """Return a draw of a rank that does not step these parameters."""

    def draw_rank(draw: Draw) -> Injection:
        names, wrong = draw_names(draw), draw.tp_rank()

        def inject(live: Live) -> None:
            if live.tp_rank == wrong:
                restore_after_step(live, names)

        return Injection(inject, Place(parameters=names))

    return draw_rank


def _update_skipped_on_a_replica(draw: Draw) -> Injection:
    """Leave out one data-parallel rank when the partition of the other is gathered."""
    names = draw.parameters_matching("*layers.1*")

    def inject(live: Live) -> None:
        if live.dp_rank == 1:
            restore_after_step(live, names)

    return Injection(inject, Place(parameters=names))


FAULTS = (
    _fault("replica_initialised_per_rank", "each rank draws a replicated parameter from its own generator",
           _initialised_per_rank, None, checks=_START, topology=TP4),
    _fault("data_parallel_replicas_initialised_apart", "the replicas of data parallelism start from other weights",
           _replicas_initialised_apart, None, checks=_START, topology=TP2_DP2),
    _fault("dropout_in_a_replicated_region",
           "each rank draws its own dropout mask over an activation that all of them hold",
           wrap_forward(_dropout_by_rank, "*.mlp", "*.self_attn.o_proj"), None, checks=("outputs_match_reference",)),
    _fault("buffer_drifts_on_one_rank", "a buffer moves by 1e-7 a step on one rank", _buffer_drifts, "replica_drift",
           topology=TP4),
    _fault("update_of_a_parameter_skipped_on_one_rank", "one rank does not step one of its parameters",
           _update_skipped(lambda draw: (draw.parameter("*_proj.weight", _NORM),)), "stale_weight"),
    _fault("update_skipped_on_one_rank", "one rank of the TP group does not step",
           _update_skipped(lambda draw: tuple(draw.parameters)), "stale_weight", topology=TP4),
    _fault("update_skipped_on_one_replica",
           "a data-parallel replica keeps the weights of a partition that others have stepped",
           _update_skipped_on_a_replica, "stale_weight", topology=TP2_DP2, zero_stage=1),
    _fault("drift_after_step_two", "a replicated parameter moves by 1e-7 on one rank after the second step",
           _drift_after_step_two, "replica_drift"),
)  # fmt: skip
