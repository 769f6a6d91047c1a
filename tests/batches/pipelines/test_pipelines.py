"""`tpcheck.watch` around the pipelines of the table: what it finds, where, and the cause that it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import tpcheck
from tests.batches.pipelines.table import PIPELINES, Pipeline
from tests.batches.test_causes import CAUSES
from tpcheck import Finding, Rank, Topology, World
from tpcheck.lab.faults.data import FAULTS

ROWS = [(pipeline, topology) for pipeline in PIPELINES for topology in pipeline.worlds]


def findings_of(rank: Rank, pipeline: Pipeline) -> list[Finding]:
    """Iterate a pipeline as a training loop does."""
    import torch
    from torch.nn.functional import dropout

    found: list[Finding] = []
    loader = tpcheck.watch(
        pipeline.build(rank),
        topology=rank.topology,
        on_mismatch="raise",
        across_dp="raise",
        timeout=20,
    )
    try:
        for _ in loader:
            if pipeline.dropout:  # differs on every rank, as it may
                dropout(torch.ones(3 + rank.rank))
    except tpcheck.Mismatch as mismatch:
        found.extend(mismatch.report.findings)
    return found


@pytest.fixture(scope="module")
def worlds() -> Iterator[Any]:
    """Worlds that are kept from row to row."""
    started: dict[Topology, World] = {}
    with ExitStack() as stack:

        def world(topology: Topology) -> World:
            if topology not in started:
                started[topology] = stack.enter_context(tpcheck.spawn(topology, timeout=90))
            return started[topology]

        yield world


@pytest.mark.parametrize(("pipeline", "topology"), ROWS, ids=lambda value: getattr(value, "name", f"{value}"))
def test_a_pipeline_leads_to_its_finding(pipeline: Pipeline, topology: Topology, worlds: Any) -> None:
    by_rank = worlds(topology).run(findings_of, pipeline)
    assert all(found == by_rank[0] for found in by_rank)
    if pipeline.fault is None:
        assert by_rank[0] == []
        return
    first, fault = by_rank[0][0], pipeline.fault
    assert (first.check, first.cause) == (*fault.checks, *fault.causes)
    assert fault.leaf in (None, first.where["field"])
    if fault.late is not None:
        assert first.where["step"] == (2 // topology.dp if fault.late else 0)
    assert {key: first.evidence[key] for key in fault.evidence} == fault.evidence
    if first.cause is not None and first.cause != "uneven_length":
        assert first.evidence["advice"].endswith(".")


def test_every_cause_of_the_data_has_a_pipeline() -> None:
    needs_a_gpu = {"rng_differs_cuda"}
    assert CAUSES - needs_a_gpu <= {cause for fault in FAULTS for cause in fault.causes}
