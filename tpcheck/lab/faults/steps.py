"""Faults of the step itself: its settings, its state, or that there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Draw, Live, Place, Planting
from tpcheck.lab.faults.injection import after_step, all_gathered, optimizer_fault, stale_after_step

_UPDATE = ("updates_match_reference",)
_SHARDED = ("*_proj.weight",)

_TP4 = Topology(tp=4)
_DP2 = Topology(tp=2, dp=2)


def _group_of_its_own(names: Sequence[str], **factors: float) -> Callable[[Live], None]:
    """Some parameters step with settings that are those of the others times a factor."""

    def plant(live: Live) -> None:
        optimizer = live.candidate.engine.optimizer
        own = [live.parameter(name) for name in names]
        ids = {id(parameter) for parameter in own}
        group = optimizer.param_groups[0]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        settings = {key: value for key, value in group.items() if key != "params"}
        settings |= {key: settings[key] * factor for key, factor in factors.items()}
        optimizer.add_param_group({"params": own, **settings})

    return plant


def _other_settings(*patterns: str, **factors: float) -> Callable[[Draw], Planting]:
    def draw(chance: Draw) -> Planting:
        names = chance.parameters_fitting(*patterns)
        return Planting(_group_of_its_own(names, **factors), Place(parameters=names))

    return draw


def _momentum_of(change: Callable[[Live, Tensor], Tensor]) -> Callable[[Draw], Planting]:
    """After the first step the momentum of sharded parameters is not what it was."""

    def draw(chance: Draw) -> Planting:
        names = chance.parameters_fitting(*_SHARDED)

        def plant(live: Live) -> None:
            def changed(step: int) -> None:
                for name in names:
                    state = live.candidate.engine.optimizer.state[live.parameter(name)]
                    state["momentum_buffer"] = change(live, state["momentum_buffer"])

            after_step(live, changed)

        return Planting(plant, Place(parameters=names))

    return draw


def _of_rank_zero(live: Live, momentum: Tensor) -> Tensor:
    """The state was loaded from the first rank's file on all of them."""
    return all_gathered(momentum, live.rank.group("tp"))[0].clone()


def _of_the_next_rank(live: Live, momentum: Tensor) -> Tensor:
    every = [torch.empty_like(momentum) for _ in range(live.tp)]
    dist.all_gather(every, momentum.contiguous(), group=live.rank.group("tp"))
    return every[(live.tp_rank + 1) % live.tp]


def _step_skipped(draw: Draw) -> Planting:
    names = tuple(draw.parameters)
    return Planting(lambda live: stale_after_step(live, names), Place(parameters=names))


def _left_out_of_the_optimizer(draw: Draw) -> Planting:
    name = draw.parameter("*_proj.weight", "*norm.weight")
    return Planting(lambda live: stale_after_step(live, (name,)), Place(parameters=(name,)))


FAULTS = (
    optimizer_fault(
        "learning_rate_of_shards",
        "sharded parameters step with another learning rate",
        _other_settings(*_SHARDED, lr=1.5),
        checks=_UPDATE,
        causes=(None,),
    ),
    optimizer_fault(
        "weight_decay_of_shards",
        "sharded parameters decay faster",
        _other_settings(*_SHARDED, weight_decay=2.0),
        checks=_UPDATE,
        causes=(None,),
        topology=_TP4,
    ),
    optimizer_fault(
        "weight_decay_of_norms",
        "norms are left out of weight decay on one side alone",
        _other_settings("*norm.weight", weight_decay=0.0),
        checks=_UPDATE,
        causes=(None,),
    ),
    optimizer_fault(
        "momentum_of_another_rank",
        "the optimizer's state is not sharded as its parameter: each rank has that of the next",
        _momentum_of(_of_the_next_rank),
        checks=_UPDATE,
        causes=("shard_order_swapped",),
        topology=_TP4,
    ),
    optimizer_fault(
        "momentum_of_rank_zero",
        "every rank has the optimizer's state of the first one's shards",
        _momentum_of(_of_rank_zero),
        checks=_UPDATE,
        causes=("shard_repeated",),
        family="qwen3",
    ),
    optimizer_fault(
        "momentum_lost",
        "the optimizer's state of sharded parameters is lost after each step",
        _momentum_of(lambda live, momentum: torch.zeros_like(momentum)),
        checks=_UPDATE,
        causes=(None,),
    ),
    optimizer_fault(
        "step_skipped_on_all_ranks",
        "a step is skipped on all ranks",
        _step_skipped,
        checks=_UPDATE,
        causes=("stale_weight",),
        topology=_TP4,
    ),
    optimizer_fault(
        "parameter_left_out_of_the_optimizer",
        "a parameter is never stepped",
        _left_out_of_the_optimizer,
        checks=_UPDATE,
        causes=("stale_weight",),
        topology=_DP2,
        zero_stage=2,
    ),
)
