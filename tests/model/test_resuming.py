"""A saved training is gone on with at other sizes of the axes, on the same samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tpcheck import Topology, spawn, verify_family
from tpcheck.core.phases import listening
from tpcheck.families.build import small_model
from tpcheck.model.options import Request, RunOptions
from tpcheck.model.rank_run import verify_on_rank
from tpcheck.model.resuming import _train_and_save, divided, variants

CHECK = "resume_matches_uninterrupted"
ALL = ("tp", "dp", "zero")


def sizes(other_sizes: tuple[str, ...], of_step: int = 1, **options: Any) -> list[tuple[int, ...]]:
    """Return tp, dp, ZeRO stage and micro-batches of each training that goes on."""
    request = Request(small_model, RunOptions(**options))
    others = [variant.options for variant in variants(request, other_sizes, of_step)]
    return [(other.topology.tp, other.topology.dp, other.zero_stage, other.accumulate) for other in others]


def test_each_size_is_changed_by_itself_and_a_step_keeps_its_micro_batches() -> None:
    grid = Topology(tp=2, dp=2)
    assert sizes(ALL, topology=grid, zero_stage=1) == [(2, 2, 1, 1), (1, 2, 1, 1), (2, 1, 1, 2), (2, 2, 2, 1)]
    assert sizes(("dp",), of_step=4, topology=Topology(tp=2), accumulate=4) == [(2, 1, 0, 4), (2, 2, 0, 2)]
    assert sizes(("dp",), of_step=3, topology=Topology(tp=1, dp=3), accumulate=3) == [(1, 3, 0, 3)]
    assert sizes((), topology=grid) == [(2, 2, 0, 1)]


@pytest.mark.parametrize("accumulate", [1, 2])  # the option, which may leave it to the configuration
def test_micro_batches_of_a_configuration_are_dealt_to_another_dp(accumulate: int) -> None:
    config = {"gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    options = RunOptions(topology=Topology(tp=1, dp=2), config=config, accumulate=accumulate)
    same, other = (each.options for each in variants(Request(small_model, options), ("dp",), 2))
    assert same == options
    assert (other.topology.dp, other.accumulate, other.config) == (1, 4, {"gradient_clipping": 1.0})


def test_another_number_of_replicas_gets_the_same_samples() -> None:
    numbered: list[Any] = [
        [[{"n": step * 10 + rank * 2 + micro} for micro in range(2)] for step in range(2)] for rank in range(2)
    ]
    (alone,) = divided(numbered, 1)
    assert [[batch["n"] for batch in step] for step in alone] == [[0, 1, 2, 3], [10, 11, 12, 13]]
    spread = divided(numbered, 4)
    assert [[batch["n"] for batch in step] for step in spread[1]] == [[1], [11]]


def test_a_distributed_checkpoint_goes_on_with_half_of_the_replicas() -> None:
    topology = Topology(tp=1, dp=2)
    options: dict[str, Any] = {"settings": {"num_hidden_layers": 1}, "replays": 2, "batch": "1x6"}
    phases: list[str] = []
    with listening(phases.append):
        report = verify_family(
            "llama", topology=topology, backend="dtensor", optimizer="adamw", checks=[CHECK], **options
        )
    report.raise_if_failed()
    assert phases[-3:] == [
        f"{CHECK}: training, saving and training on",
        f"{CHECK}: going on from torch.distributed.checkpoint",
        f"{CHECK}: going on from torch.distributed.checkpoint, at tp 1, dp 1, ZeRO 0, 2 micro-batches",
    ]
    not_compared = report.verdict.coverage.not_compared
    assert len(not_compared) == 3
    assert all("generator" in name for name in not_compared)  # and neither a size nor a tensor


def test_the_training_that_is_verified_measures_what_resuming_would_measure_once_more(tmp_path: Path) -> None:
    options = RunOptions.of(topology=Topology(tp=1, dp=2), backend="dtensor", replays=2, checks=["all"], batch="1x6")
    request = Request(partial(small_model, "llama", {"num_hidden_layers": 1}), options)
    with spawn(options.topology, timeout=options.timeout) as world:
        verified, other = world.run(verify_on_rank, request)
        measured, measured_elsewhere = world.run(_train_and_save, request, tmp_path, 1, measures=True)
    assert verified.tolerance is not None
    assert verified.tolerance == measured.tolerance
    assert other.tolerance is measured_elsewhere.tolerance is None
