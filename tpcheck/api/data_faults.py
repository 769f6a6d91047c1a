"""Runs the faulty data pipelines in small worlds, watched, and compares what is found with what is true."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tpcheck.errors import Mismatch
from tpcheck.records import Finding
from tpcheck.records.caught import CONTROL, Caught
from tpcheck.topology import Topology
from tpcheck.world import Rank, spawn

if TYPE_CHECKING:
    from tpcheck.faults import DataFault
    from tpcheck.faults.data import Build

_PATIENCE = 20.0  # seconds that ranks wait for each other at a batch


def run_data_fault(fault: DataFault, *, seed: int = 0, timeout: float = 120.0) -> Caught:
    """Iterate a faulty pipeline on every rank of one of the topologies in which it shows, drawn by the seed."""
    start = time.monotonic()
    topology = fault.worlds[seed % len(fault.worlds)]
    findings = _found(fault.build, topology, dropout=True, timeout=timeout)
    first = findings[0] if findings else None
    return Caught(
        fault=fault.name,
        kind=fault.kind,
        what=fault.what,
        verdict="passed" if first is None else "failed",
        checks=tuple(dict.fromkeys(finding.check for finding in findings)),
        place=None if first is None else _place(first),
        true_places=tuple(leaf for leaf in [fault.leaf] if leaf is not None),
        place_is_right=first is not None
        and first.check in fault.checks
        and fault.is_right_place(first.where, topology),
        cause=None if first is None else first.cause,
        true_causes=fault.causes,
        cause_is_right=first is not None
        and first.cause in fault.causes
        and all(first.evidence.get(key) == value for key, value in fault.evidence.items()),
        margin=0.0 if first is None else first.margin,
        dtype="any",
        seed=seed,
        seconds=time.monotonic() - start,
        link=fault.link,
    )


def run_data_control(fault: DataFault, *, seed: int = 0, timeout: float = 120.0) -> Caught:
    """Iterate the mended pipeline of a fault."""
    assert fault.mended is not None
    start = time.monotonic()
    topology = fault.mended_worlds[seed % len(fault.mended_worlds)]
    findings = _found(fault.mended, topology, dropout=fault.mended_dropout, timeout=timeout)
    return Caught(
        fault=f"{fault.name}, mended",
        kind=CONTROL,
        what="the pipeline as it should be",
        verdict="failed" if findings else "passed",
        margin=max((finding.margin for finding in findings), default=0.0),
        dtype="any",
        seed=seed,
        seconds=time.monotonic() - start,
    )


def _found(build: Build, topology: Topology, *, dropout: bool, timeout: float) -> tuple[Finding, ...]:
    with spawn(topology, timeout=timeout, env={"TPCHECK": "1"}) as world:  # whatever the user's project says
        findings: tuple[Finding, ...] = world.run(_findings_of, build, dropout)[0]
        return findings


def _findings_of(rank: Rank, build: Build, dropout: bool) -> tuple[Finding, ...]:
    """Iterate a pipeline as a training loop does; its dropout draws other numbers on every rank, as it may."""
    import torch

    from tpcheck.dataloader import watch

    loader = watch(
        build(rank),
        topology=rank.topology,
        every=1,
        on_mismatch="raise",
        across_dp="raise",
        overlap=False,
        timeout=_PATIENCE,
    )
    try:
        for _ in loader:
            if dropout:
                torch.nn.functional.dropout(torch.ones(3 + rank.rank))
    except Mismatch as mismatch:
        return tuple(mismatch.report.findings)
    return ()


def _place(finding: Finding) -> str:
    return str(finding.where.get("field") or "(the whole batch)")
