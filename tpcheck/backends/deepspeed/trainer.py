"""A DeepSpeed engine that transformers' Trainer has made, and whose steps it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.backends.deepspeed.candidate import DeepSpeedCandidate, observed_clipping
from tpcheck.backends.interface import StepObserver, TrainingOptions
from tpcheck.backends.trainer_loop.loop import RESUMED, TrainerLoop
from tpcheck.core.topology import Topology


class TrainerCandidate(DeepSpeedCandidate):
    """A model that the Trainer shards with DeepSpeed's AutoTP, and trains."""

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        topology: Topology,
        options: TrainingOptions,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        low_precision = {"bf16": options.dtype is torch.bfloat16, "fp16": options.dtype is torch.float16}
        arguments = {"deepspeed": dict(config), **low_precision}
        warmup = config.get("scheduler", {}).get("params", {}).get("warmup_num_steps")
        if warmup is not None:  # the Trainer requires its arguments to say the same
            arguments["warmup_steps"] = warmup
        loop = TrainerLoop(model, options, **arguments)
        super().__init__(loop.trainer.deepspeed, topology, options.accumulate, shapes)
        self.trainer = loop.trainer
        self._loop = loop
        self._norms: list[Any] = []
        self._scale_of_step = 1.0
        loop.end_with(self)

    def train(self, observer: StepObserver) -> None:
        with observed_clipping() as self._norms:
            self._loop.train(observer)

    def loss_scale(self) -> float:
        """Return the engine's scale. The loop's observer asks before each step, which may change it."""
        self._scale_of_step = super().loss_scale()
        return self._scale_of_step

    def loop_resumes_by(self) -> Mapping[str, tuple[str, ...]]:
        return {RESUMED: ("dp",)}  # the engine's checkpoint

    def counters(self) -> Mapping[str, Any]:
        return {"steps of the engine": self.engine.global_steps, **super().counters(), **self._loop.counters()}

    def gradient_norm(self) -> float | None:
        norm = self._norms[-1] if self._norms else self.engine.get_global_grad_norm()
        return None if norm is None else self._unscaled_norm(norm, self._scale_of_step)
