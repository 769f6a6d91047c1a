"""Faults of what modules send back: input gradients that are not reduced, or too often."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Draw, Live, Place, Planting
from tpcheck.lab.faults.injection import all_reduced, gradient_fault, with_backward

_COLUMN = ("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj")
_ROW = ("*.o_proj", "*.down_proj")

_TP4 = Topology(tp=4)
_TP2_DP2 = Topology(tp=2, dp=2)


def _input_gradient_not_reduced(draw: Draw) -> Planting:
    name = draw.module(*_COLUMN)

    def plant(live: Live) -> None:
        layer = live.module(name)
        layer.forward = lambda hidden: functional.linear(hidden, layer.weight, layer.bias)

    return Planting(plant, Place(modules=(name,)))


def _input_gradient_reduced_twice(draw: Draw) -> Planting:
    name = draw.module(*_COLUMN)

    def plant(live: Live) -> None:
        def reduced(gradient: Tensor) -> Tensor:
            return all_reduced(gradient, live.rank.group("tp"))

        layer = live.module(name)
        once = layer.forward
        layer.forward = lambda hidden: once(with_backward(hidden, reduced))

    return Planting(plant, Place(modules=(name,)))


def _reduce_lost_on_a_strided_gradient(draw: Draw) -> Planting:
    name = draw.module(*_COLUMN)

    def plant(live: Live) -> None:
        def reduced(gradient: Tensor) -> Tensor:
            strided = gradient.transpose(0, 1).contiguous().transpose(0, 1)
            dist.all_reduce(strided.contiguous(), group=live.rank.group("tp"))  # the sum lies in a copy
            return strided

        layer = live.module(name)
        layer.forward = lambda hidden: functional.linear(with_backward(hidden, reduced), layer.weight, layer.bias)

    return Planting(plant, Place(modules=(name,)))


def _reduced_twice_on_one_rank(draw: Draw) -> Planting:
    name, wrong = draw.module(*_COLUMN), draw.tp_rank()

    def plant(live: Live) -> None:
        def again(gradient: Tensor) -> Tensor:
            total = all_reduced(gradient, live.rank.group("tp"))
            return total if live.tp_rank == wrong else gradient

        layer = live.module(name)
        once = layer.forward
        layer.forward = lambda hidden: once(with_backward(hidden, again))

    return Planting(plant, Place(modules=(name,)))


def _row_parallel_backward_reduces(draw: Draw) -> Planting:
    """The backward of a differentiable all-reduce sums gradients that are replicas already."""
    name = draw.module(*_ROW)

    def plant(live: Live) -> None:
        def reduced(gradient: Tensor) -> Tensor:
            return all_reduced(gradient, live.rank.group("tp"))

        layer = live.module(name)
        once = layer.forward
        layer.forward = lambda hidden: with_backward(once(hidden), reduced)

    return Planting(plant, Place(modules=(name,), parameters=(f"{name}.weight",)))


FAULTS = (
    gradient_fault(
        "column_input_gradient_not_reduced",
        "a column-parallel layer sends back its rank's term of the input gradient instead of the sum",
        _input_gradient_not_reduced,
        causes=("missing_reduce",),
    ),
    gradient_fault(
        "column_input_gradient_not_reduced_on_four_ranks",
        "a column-parallel layer sends back its rank's term of the input gradient, on four ranks",
        _input_gradient_not_reduced,
        causes=("missing_reduce",),
        topology=_TP4,
    ),
    gradient_fault(
        "column_input_gradient_reduced_twice",
        "a column-parallel layer sums its input gradient twice",
        _input_gradient_reduced_twice,
        causes=("duplicate_reduce",),
        topology=_TP2_DP2,
        zero_stage=1,
    ),
    gradient_fault(
        "column_input_gradient_reduced_twice_on_one_rank",
        "one rank alone sums the input gradient of a column-parallel layer twice",
        _reduced_twice_on_one_rank,
        causes=("duplicate_reduce",),
        family="gemma2",
    ),
    gradient_fault(
        "column_reduce_lost_on_a_strided_gradient",
        "the all-reduce of a non-contiguous input gradient sums a copy and returns the original",
        _reduce_lost_on_a_strided_gradient,
        causes=("missing_reduce",),
        link="https://github.com/NovaSky-AI/SkyRL/pull/1886",
    ),
    gradient_fault(
        "row_parallel_backward_reduces",
        "the backward of a row-parallel layer's all-reduce sums gradients that are replicas already",
        _row_parallel_backward_reduces,
        causes=("duplicate_reduce", "gradient_scaled"),
        topology=_TP4,
    ),
)
