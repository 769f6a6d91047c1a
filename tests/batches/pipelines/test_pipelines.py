"""`tpcheck.watch` around the pipelines of the table: its finding, the place and the cause."""

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


def findings_of(rank: Rank, pipeline: Pipeline) -> list[Finding]:
    """Iterate a pipeline as a training loop does."""
    import torch
    from torch.nn.functional import dropout

    loader = tpcheck.watch(
        pipeline.build(rank),
        topology=rank.topology,
        on_mismatch="raise",
        across_dp="raise",
        over_steps="raise",
        timeout=20,
    )
    try:
        for _ in loader:
            if pipeline.dropout:  # differs on every rank, as it may
                dropout(torch.ones(3 + rank.rank))
    except tpcheck.Mismatch as mismatch:
        return list(mismatch.report.findings)
    return []


@pytest.fixture(scope="module")
def worlds() -> Iterator[Any]:
    """Worlds that all rows share."""
    started: dict[Topology, World] = {}
    with ExitStack() as stack:

        def world(topology: Topology) -> World:
            if topology not in started:
                started[topology] = stack.enter_context(tpcheck.spawn(topology, timeout=90))
            return started[topology]

        yield world


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.name)
def test_a_pipeline_leads_to_its_finding(pipeline: Pipeline, worlds: Any) -> None:
    by_rank = worlds(pipeline.topology).run(findings_of, pipeline)
    assert all(findings == by_rank[0] for findings in by_rank)
    if pipeline.fault is None:
        assert by_rank[0] == []
        return
    first, fault = by_rank[0][0], pipeline.fault
    assert (first.check, first.cause) == (*fault.checks, *fault.causes)
    assert fault.leaf in (None, first.where["field"])
    if fault.late is not None:
        assert first.where["step"] == (2 // pipeline.topology.dp if fault.late else 0)
    assert {key: first.evidence[key] for key in fault.evidence} == fault.evidence
    if first.cause is not None and first.cause != "uneven_length":
        assert first.evidence["advice"].endswith(".")


def test_every_cause_of_a_batch_mismatch_has_a_pipeline() -> None:
    needs_a_gpu = {"rng_differs_cuda"}
    assert CAUSES - needs_a_gpu <= {cause for fault in FAULTS for cause in fault.causes}
