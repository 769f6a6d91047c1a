"""A model that transformers has sharded, trained by its Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.backends.interface import RankLike, StepObserver, TrainingOptions
from tpcheck.backends.peft_models import is_peft_model
from tpcheck.backends.sgd import states_like
from tpcheck.backends.trainer_loop.loop import RESUMED, RESUMED_WITH_WEIGHTS, TrainerLoop
from tpcheck.backends.transformers.candidate import TransformersCandidate


class OptimizerOfTrainer:
    """The optimizer that the Trainer has made, in the place of tpcheck's own."""

    has_masters = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> float | None:
        """Do nothing: the Trainer steps."""

    def state(self, parameter: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return states_like(parameter, self.optimizer)


class TrainerCandidate(TransformersCandidate):
    """A model that transformers has sharded, whose steps the Trainer takes."""

    def __init__(self, module: nn.Module, rank: RankLike, options: TrainingOptions) -> None:
        loop = TrainerLoop(module, options)
        optimizer: Any = loop.trainer.optimizer
        super().__init__(module, rank, OptimizerOfTrainer(optimizer.optimizer), accumulate=options.accumulate)
        self.trainer = loop.trainer
        self._loop = loop
        loop.end_with(self)

    def loop_resumes_by(self) -> Mapping[str, tuple[str, ...]]:
        ways = (RESUMED,) if is_peft_model(self.module) else (RESUMED, RESUMED_WITH_WEIGHTS)
        return dict.fromkeys(ways, ("tp", "dp"))  # weights are saved whole

    def train(self, observer: StepObserver) -> None:
        self._loop.train(observer)

    def counters(self) -> Mapping[str, Any]:
        return self._loop.counters()
