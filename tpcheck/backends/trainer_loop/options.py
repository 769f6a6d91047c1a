"""What the Trainer does by default, in the options by which the reference trains."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.optimizer import named_optimizer


def resolved_for_trainer(options: TrainingOptions) -> TrainingOptions:
    """Return the options with the Trainer's schedule, and which parameters it decays."""
    return replace(
        options,
        schedule=partial(_linear_schedule, options.steps),
        decayed_parameters=None if named_optimizer(options) is None else decayed_parameters,
    )


def _linear_schedule(steps: int, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the Trainer's default schedule: the rate falls to zero over the run."""
    schedule: torch.optim.lr_scheduler.LRScheduler
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    return schedule


def decayed_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters whose weights the Trainer decays: not biases, and not those of norms."""
    return frozenset(Trainer.get_decay_parameter_names(None, model))
