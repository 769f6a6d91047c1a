"""Faults of column-parallel layers that gather their output: parts missing, misplaced or taken for the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Live, ModelFault
from tpcheck.lab.faults.injection import Forward, all_gathered, collective_fault, instead, with_value

_TP4 = Topology(tp=4)


def _columns(layer: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, layer.weight, layer.bias)


def _gathered_in_another_order(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    own = _columns(layer, hidden)
    return with_value(own, torch.cat(all_gathered(own, layer.mp_group)[::-1], dim=-1))


def _own_columns_alone(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Write one's own columns into a buffer of zeros for all, which is then not summed over the ranks."""
    own = _columns(layer, hidden)
    whole = [own if one == live.tp_rank else torch.zeros_like(own) for one in range(live.tp)]
    return torch.cat(whole, dim=-1)


def _own_columns_everywhere(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    return torch.cat([_columns(layer, hidden)] * live.tp, dim=-1)


def _columns_of_one_rank_lost(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Gather into a buffer of zeros which one rank's columns do not reach."""
    own = _columns(layer, hidden)
    parts = all_gathered(own, layer.mp_group)
    parts[tp_rank] = torch.zeros_like(own)
    return with_value(own, torch.cat(parts, dim=-1))


def _columns_of_one_rank_unwritten(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Gather into uninitialised memory which one rank's columns do not reach."""
    own = _columns(layer, hidden)
    parts = all_gathered(own, layer.mp_group)
    if live.tp_rank == tp_rank:
        parts[tp_rank - 1] = torch.full_like(own, float("nan"))
    return with_value(own, torch.cat(parts, dim=-1))


def _head(name: str, what: str, forward: Forward, causes: tuple[str | None, ...], **options: Any) -> ModelFault:
    return collective_fault(name, what, instead(forward, "lm_head"), causes, **options)


FAULTS = (
    _head(
        "columns_gathered_in_another_order",
        "a column-parallel layer gathers its output in another order of ranks",
        _gathered_in_another_order,
        ("shard_order_swapped",),
        topology=_TP4,
    ),
    _head(
        "columns_not_gathered",
        "a column-parallel layer fills a buffer with its own columns, and nobody sums the buffers",
        _own_columns_alone,
        ("missing_reduce",),
    ),
    _head(
        "own_columns_in_every_place",
        "a column-parallel layer takes its own columns for those of all ranks",
        _own_columns_everywhere,
        ("shard_repeated",),
    ),
    _head(
        "columns_of_one_rank_lost",
        "one rank's columns do not reach the gathered output, which stays zero there",
        _columns_of_one_rank_lost,
        ("all_zero",),
        topology=_TP4,
    ),
    _head(
        "columns_of_one_rank_unwritten",
        "a gathered output holds uninitialised memory on one rank",
        _columns_of_one_rank_unwritten,
        ("not_finite",),
    ),
)
