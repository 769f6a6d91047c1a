"""Faults of the forward pass: collectives that are missing, doubled, of another kind or over another group."""

from __future__ import annotations

from tpcheck.faults.fault import Draw, Live, ModelFault, Place, Planting

_KIND = "forward collectives"
_ROW = ("*.o_proj", "*.down_proj")


def _reduce_skipped(draw: Draw) -> Planting:
    name = draw.module(*_ROW)

    def plant(live: Live) -> None:
        layer = live.module(name)
        layer.forward = lambda hidden: hidden @ layer.weight.t()

    return Planting(plant, Place(modules=(name,)))


def _reduced_twice(draw: Draw) -> Planting:
    name = draw.module(*_ROW)

    def plant(live: Live) -> None:
        layer = live.module(name)
        once = layer.forward
        layer.forward = lambda hidden: once(hidden) * live.tp  # what a second all-reduce makes of replicas

    return Planting(plant, Place(modules=(name,)))


FAULTS = (
    ModelFault(
        "row_parallel_reduce_skipped",
        _KIND,
        "a row-parallel layer returns its rank's term instead of the sum",
        _reduce_skipped,
        checks=("outputs_match_reference",),
        causes=("missing_reduce",),
    ),
    ModelFault(
        "row_parallel_reduced_twice",
        _KIND,
        "a row-parallel layer sums its terms twice",
        _reduced_twice,
        checks=("outputs_match_reference",),
        causes=("duplicate_reduce",),
    ),
)
