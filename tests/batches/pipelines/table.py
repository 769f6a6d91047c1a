"""Pipelines as people build them, each with what tpcheck should say of it. A pipeline is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.batches.pipelines import odd
from tpcheck import Topology
from tpcheck.lab.faults import pipelines as build
from tpcheck.lab.faults.data import FAULTS, TP, TP_DP, DataFault

BOTH = (TP, TP_DP)


@dataclass(frozen=True)
class Pipeline:
    """One way to build the batches, and the finding that it should lead to.

    Attributes:
        name: Of the row.
        build: Returns a rank's batches.
        fault: What is wrong with them; None where nothing should be found.
        worlds: Topologies that it is run on.
        dropout: Whether the loop draws from each rank's torch generator after every batch, on each rank another number.
    """

    name: str
    build: Callable[..., build.Batches]
    fault: DataFault | None = None
    worlds: tuple[Topology, ...] = BOTH
    dropout: bool = True


WRONG = [Pipeline(fault.name, fault.build, fault, fault.worlds) for fault in FAULTS]
MENDED = [
    Pipeline(f"mended, {fault.name}", fault.mended, None, fault.mended_worlds, fault.mended_dropout)
    for fault in FAULTS
    if fault.mended is not None
]
CLEAN = [
    Pipeline("accelerate, stream, sharded", partial(build.accelerated_stream, sharded=True), worlds=(TP,)),
    Pipeline("NaN, empty tensors, no samples", odd.odd_but_equal),
]

PIPELINES = [*WRONG, *MENDED, *CLEAN]
