"""Faults of what should be the same on several ranks, and is not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Draw, Live, ModelFault, Place, Planting
from tpcheck.lab.faults.injection import after_step, stale_after_step

_KIND = "replicas"
_START = ("weights_match_reference", "replicas_agree")
_UPDATE = ("updates_match_reference", "replicas_agree")
_NORM = "*norm.weight"
_ROTARY = "model.rotary_emb"

_TP4 = Topology(tp=4)
_DP2 = Topology(tp=2, dp=2)


def _initialised_per_rank(draw: Draw) -> Planting:
    name, seed = draw.parameter(_NORM), draw.random.randrange(2**31)

    def plant(live: Live) -> None:
        chance = torch.Generator().manual_seed(seed + live.tp_rank)
        weight = live.parameter(name).data
        weight.copy_(torch.randn(weight.shape, generator=chance, dtype=torch.float64))

    return Planting(plant, Place(parameters=(name,)))


def _replicas_initialised_apart(draw: Draw) -> Planting:
    name = draw.parameter("*_proj.weight", _NORM)

    def plant(live: Live) -> None:
        if live.dp_rank == 1:
            live.parameter(name).data.mul_(1.01)

    return Planting(plant, Place(parameters=(name,)))


def _dropout_in_a_replicated_region(draw: Draw) -> Planting:
    name, seed = draw.module("*.mlp", "*.self_attn.o_proj"), draw.random.randrange(2**31)

    def plant(live: Live) -> None:
        module = live.module(name)
        once = module.forward

        def forward(hidden: Tensor) -> Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(seed + live.tp_rank)
                return functional.dropout(once(hidden), 0.1)

        module.forward = forward

    return Planting(plant, Place(modules=(name,)))


def _buffer_drifts(draw: Draw) -> Planting:
    wrong = draw.tp_rank()

    def plant(live: Live) -> None:
        def drift(step: int) -> None:
            if live.tp_rank == wrong:
                live.module(_ROTARY).inv_freq.mul_(1 + 1e-7)

        after_step(live, drift)

    return Planting(plant, Place(modules=(_ROTARY,)))


def _update_skipped_for_a_parameter(draw: Draw) -> Planting:
    name, wrong = draw.parameter("*_proj.weight", _NORM), draw.tp_rank()

    def plant(live: Live) -> None:
        if live.tp_rank == wrong:
            stale_after_step(live, (name,))

    return Planting(plant, Place(parameters=(name,)))


def _update_skipped_on_a_rank(draw: Draw) -> Planting:
    wrong, names = draw.tp_rank(), tuple(draw.parameters)

    def plant(live: Live) -> None:
        if live.tp_rank == wrong:
            stale_after_step(live, names)

    return Planting(plant, Place(parameters=names))


def _update_skipped_on_a_replica(draw: Draw) -> Planting:
    """The partition of one data-parallel rank is not gathered again by the other."""
    names = draw.parameters_fitting("*layers.1*")

    def plant(live: Live) -> None:
        if live.dp_rank == 1:
            stale_after_step(live, names)

    return Planting(plant, Place(parameters=names))


def _drift_after_step_two(draw: Draw) -> Planting:
    name, wrong = draw.parameter(_NORM), draw.tp_rank()

    def plant(live: Live) -> None:
        def drift(step: int) -> None:
            if step == 1 and live.tp_rank == wrong:
                live.parameter(name).data.mul_(1 + 1e-7)

        after_step(live, drift)

    return Planting(plant, Place(parameters=(name,)))


FAULTS = (
    ModelFault(
        "replica_initialised_per_rank",
        _KIND,
        "each rank draws a replicated parameter from its own generator",
        _initialised_per_rank,
        checks=_START,
        causes=(None,),
        topology=_TP4,
    ),
    ModelFault(
        "data_parallel_replicas_initialised_apart",
        _KIND,
        "the replicas of data parallelism start from other weights",
        _replicas_initialised_apart,
        checks=_START,
        causes=(None,),
        topology=_DP2,
    ),
    ModelFault(
        "dropout_in_a_replicated_region",
        _KIND,
        "each rank draws its own dropout mask over an activation that all of them hold",
        _dropout_in_a_replicated_region,
        checks=("outputs_match_reference",),
        causes=(None,),
    ),
    ModelFault(
        "buffer_drifts_on_one_rank",
        _KIND,
        "a buffer moves by 1e-7 a step on one rank",
        _buffer_drifts,
        checks=_UPDATE,
        causes=("replica_drift",),
        topology=_TP4,
    ),
    ModelFault(
        "update_of_a_parameter_skipped_on_one_rank",
        _KIND,
        "one rank does not step one of its parameters",
        _update_skipped_for_a_parameter,
        checks=_UPDATE,
        causes=("stale_weight",),
    ),
    ModelFault(
        "update_skipped_on_one_rank",
        _KIND,
        "one rank of the TP group does not step",
        _update_skipped_on_a_rank,
        checks=_UPDATE,
        causes=("stale_weight",),
        topology=_TP4,
    ),
    ModelFault(
        "update_skipped_on_one_replica",
        _KIND,
        "a data-parallel replica keeps the weights of a partition that others have stepped",
        _update_skipped_on_a_replica,
        checks=_UPDATE,
        causes=("stale_weight",),
        topology=_DP2,
        zero_stage=1,
    ),
    ModelFault(
        "drift_after_step_two",
        _KIND,
        "a replicated parameter moves by 1e-7 on one rank after the second step",
        _drift_after_step_two,
        checks=_UPDATE,
        causes=("replica_drift",),
    ),
)
