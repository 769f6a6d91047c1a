"""Pipelines as people build them, each with the expected finding. A pipeline is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.batches.pipelines import odd
from tpcheck import Topology
from tpcheck.lab.faults import pipelines as build
from tpcheck.lab.faults.data import FAULTS, TP, TP_DP, DataFault


@dataclass(frozen=True)
class Pipeline:
    """One way to build the batches, and the finding that it should lead to.

    Attributes:
        name: Of the row.
        topology: Where it is run.
        build: Returns a rank's batches.
        fault: The injected fault; None where nothing should be found.
        dropout: Whether the loop draws from each rank's torch generator after every batch, on each rank another number.
    """

    name: str
    topology: Topology
    build: Callable[..., build.Batches]
    fault: DataFault | None = None
    dropout: bool = True


# The last topology of a fault is the larger one, whose ranks contain the smaller one's TP group.
FAULTY = [Pipeline(fault.name, fault.worlds[-1], fault.build, fault) for fault in FAULTS]
FIXED = [
    Pipeline(f"fixed, {fault.name}", fault.fixed_worlds[-1], fault.fixed, None, fault.fixed_dropout)
    for fault in FAULTS
    if fault.fixed is not None
]
CLEAN = [
    Pipeline("accelerate, stream, sharded", TP, partial(build.accelerated_stream, sharded=True)),
    Pipeline("NaN, empty tensors, no samples", TP_DP, odd.odd_but_equal),
]

PIPELINES = [*FAULTY, *FIXED, *CLEAN]
