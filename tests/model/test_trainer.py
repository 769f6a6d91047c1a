"""transformers' Trainer drives the steps: the reference is its mathematics, and sharded models train as it does."""

from __future__ import annotations

import os
import random
from functools import partial
from typing import Any

import pytest
import torch

import tpcheck
from tpcheck import Topology, UsageError, verify_family
from tpcheck.backends.deepspeed.backend import DeepSpeedBackend
from tpcheck.backends.interface import TrainingOptions
from tpcheck.families.build import small_model
from tpcheck.lab.faults.runs import fault_runs
from tpcheck.model.options import Request, RunOptions, require_valid

# What people train with: Adam, micro-batches with unlike numbers of labels, two replicas.
TRAINED: dict[str, Any] = {"optimizer": "adamw", "accumulate": 2, "loss": "token_mean", "loop": "trainer"}
CLEAN_MARGIN = 0.2


def worst_margins(report: tpcheck.Report) -> dict[str, float]:
    return {check.check: check.worst_margin for check in report.verdict.checks}


def test_the_reference_is_to_the_bit_what_the_trainer_computes_on_the_whole_model() -> None:
    """One process, and nothing sharded: loss, gradients, norm, steps, states, logs and evaluation."""
    options = {**TRAINED, "optimizer": "sgd"}
    report = verify_family("llama", topology=Topology(tp=1), backend="transformers", replays=1, **options)
    assert report.passed, report
    assert set(worst_margins(report).values()) == {0.0}


@pytest.mark.parametrize(("backend", "zero_stage"), [("deepspeed", 1), ("transformers", 0)])
def test_a_right_trainer_passes_every_check(backend: str, zero_stage: int) -> None:
    options = {**TRAINED, "zero_stage": zero_stage, "steps": 1}  # the controls of the corpus take more
    report = verify_family("llama", topology=Topology(tp=2, dp=2), backend=backend, **options)
    assert report.passed, report
    assert max(worst_margins(report).values()) < CLEAN_MARGIN
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


def test_the_trainer_scales_losses_in_float16_as_its_configuration_says() -> None:
    config = {"fp16": {"enabled": "auto", "loss_scale_window": 1, "initial_scale_power": 8}}
    options = {"backend": "deepspeed", "loop": "trainer", "dtype": "float16", "zero_stage": 1, "replays": 2}
    settings = {"num_hidden_layers": 1}
    report = verify_family("llama", topology=Topology(tp=2), config=config, settings=settings, **options)
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


@pytest.mark.parametrize("name", ["trainer_clips_by_own_shards", "resume_trainer_skips_no_batches"])
def test_a_fault_of_the_trainer_is_caught_at_its_place_with_a_right_cause(name: str) -> None:
    """The others are in the committed table."""
    (run,) = fault_runs([name])
    result = run.run()
    assert result.is_right, result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "dtensor"}, "the Trainer drives deepspeed and transformers"),
        ({"loop": "lightning"}, r"loop='lightning': expected one of"),
        ({"checks": ["initialisation_matches_reference"]}, "any other check with loop=trainer"),
    ],
    ids=["another backend", "another loop", "initialisation"],
)
def test_what_the_trainer_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    options = {"backend": "deepspeed", "loop": "trainer", **options}
    with pytest.raises(UsageError, match=message):
        require_valid(Request(lambda: None, RunOptions.of(**options)))


def test_a_schedule_that_the_trainer_would_fill_in_is_refused() -> None:
    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}}
    options = TrainingOptions(torch.float64, loop="trainer", config=config)
    with pytest.raises(UsageError, match=r"config\.scheduler\.params=.*expected numbers"):
        DeepSpeedBackend().resolved(options)


def test_entries_without_a_row_for_each_sample_are_refused() -> None:
    def batch(coordinate: Any, step: int) -> Any:
        tokens = torch.arange(16).reshape(2, 8)
        return {"input_ids": tokens, "labels": tokens, "logits_to_keep": 0}

    with pytest.raises(UsageError, match=r"batch\['logits_to_keep'\]"):
        tpcheck.verify(
            partial(small_model, "llama"), batch, topology=Topology(tp=2), backend="transformers", loop="trainer"
        )


def test_a_run_leaves_no_trace_in_the_process(tp_spawn: Any) -> None:
    with tp_spawn(tp=2) as world:
        assert world.run(state_around_a_session) == (True, True)


def state_around_a_session(rank: Any) -> bool:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from tpcheck.backends.trainer_loop.stand_ins import trainer_session

    def state() -> Any:
        shared = [dict(each._shared_state) for each in (PartialState, AcceleratorState, GradientState)]
        patched = (PartialState._prepare_backend, Accelerator.multi_device, torch.distributed.all_reduce)
        return shared, dict(os.environ), patched, torch.rand(1), random.random()  # generators are put back, too

    torch.manual_seed(0)
    random.seed(0)
    before = state()
    torch.manual_seed(0)
    random.seed(0)
    with trainer_session():
        accelerator = Accelerator()
        assert accelerator.num_processes == 2
        assert accelerator.multi_device
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        torch.manual_seed(7)
        random.seed(7)
    return bool(state() == before)
