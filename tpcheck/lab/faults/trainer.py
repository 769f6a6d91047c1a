"""Faults of the loop that transformers' Trainer runs: what it divides by, clips by, logs, and how its rate falls."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.nn.utils import get_total_norm

from tpcheck.backends.local_part import local_part
from tpcheck.lab.faults.fault import TP2, TP2_DP2, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import inject_always
from tpcheck.lab.faults.training import ignoring_count

_LOOP = {"loop": "trainer"}
_in_loop = fault_constructor("transformers' Trainer", "outputs_match_reference", topology=TP2_DP2, steps=1)


def _loss_counts_as_scaled(live: Live) -> None:
    live.candidate.trainer.loss_is_scaled_for_ga = True


def _own_loss_is_logged(live: Live) -> None:
    """Log what each rank has, as a Trainer that gathers nothing does."""
    from transformers import trainer as trainer_module  # takes seconds

    log = live.candidate.trainer._maybe_log_save_evaluate

    def without_gathering(*args: Any, **kwargs: Any) -> None:
        with patch.object(trainer_module, "nested_gather", lambda tensor, mode: tensor):
            log(*args, **kwargs)

    live.candidate.trainer._maybe_log_save_evaluate = without_gathering


def _clipped_by_own_shards(live: Live) -> None:
    trainer = live.candidate.trainer

    def clip(model: Any) -> torch.Tensor:
        parameters = {name: each for name, each in model.named_parameters() if each.grad is not None}
        norm = get_total_norm([live.candidate.gradient(name) for name in parameters])
        for parameter in parameters.values():
            local_part(parameter.grad).mul_(torch.clamp(trainer.args.max_grad_norm / (norm + 1e-6), max=1.0))
        return norm

    trainer._clip_grad_norm = clip


def _rate_falls_for_each_replica(live: Live) -> None:
    schedule = live.candidate.trainer.lr_scheduler
    step = schedule.step

    def step_for_all() -> None:
        for _ in range(live.rank.topology.dp):
            step()

    schedule.step = step_for_all


def _weight_left_out_of_step(draw: Draw) -> Injection:
    """In bfloat16 the Trainer steps the weights themselves: a step is about as small as their rounding."""
    name, wrong = draw.parameter("*_proj.weight"), draw.tp_rank()

    def inject(live: Live) -> None:
        weight = live.parameter(name)
        before = local_part(weight.data).clone()

        def restore(*_: Any) -> None:
            if live.tp_rank == wrong:
                local_part(weight.data).copy_(before)

        live.candidate.trainer.optimizer.optimizer.register_step_post_hook(restore)

    return Injection(inject, Place(parameters=(name,)))


FAULTS = (
    _in_loop("trainer_ignores_count", "the model divides by its own labels although the Trainer gives it the count",
             ignoring_count, "mean_of_local_means", options={**_LOOP, "loss": "token_mean", "accumulate": 2}),
    _in_loop("trainer_loss_not_divided", "a loss that is a mean is taken for one over all micro-batches",
             inject_always(_loss_counts_as_scaled), None, options={**_LOOP, "accumulate": 2},
             link="https://github.com/huggingface/transformers/issues/34263"),
    _in_loop("trainer_logs_own_loss", "each rank logs the loss of its own replica",
             inject_always(_own_loss_is_logged), "missing_reduce", options=_LOOP),
    _in_loop("trainer_clips_by_own_shards", "the Trainer clips by the norm of each rank's shards",
             inject_always(_clipped_by_own_shards), "norm_is_local", options=_LOOP, backend="transformers",
             topology=TP2, topologies=(TP2,), checks=("gradient_norm_matches_reference",)),
    _in_loop("trainer_rate_falls_too_fast", "the schedule takes a step for each replica",
             inject_always(_rate_falls_for_each_replica), None, options=_LOOP, steps=2,
             checks=("updates_match_reference",)),
    _in_loop("trainer_leaves_a_weight_out", "in bfloat16 without masters one rank does not step a weight",
             _weight_left_out_of_step, "stale_weight", options=_LOOP, backend="transformers", dtype="bfloat16",
             topology=TP2, topologies=(TP2,), checks=("updates_match_reference",)),
)  # fmt: skip
