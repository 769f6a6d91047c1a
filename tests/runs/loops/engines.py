"""Training loops of DeepSpeed engines, from ZeRO 0 to 3, over AutoTP and data parallelism."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from tests.runs.loops.huggingface import CausalTraining
from tests.runs.loops.loop import Weights
from tpcheck.backends.deepspeed import DeepSpeedBackend
from tpcheck.backends.interface import TrainingOptions


class DeepSpeed(CausalTraining):
    """An engine's loop: `backward` and `step` for each micro-batch.

    Attributes:
        configured: `gradient_accumulation_steps` of the engine; None for what the loop does.
        scale_power: The first loss scale in float16, as a power of two.
    """

    zero = 0
    configured: int | None = None
    scale_power = 8

    def train(self) -> Weights:
        with ExitStack() as self.stack:
            if self.dtype is torch.float16:  # torch computes in it on any CPU, DeepSpeed asks for instructions
                import deepspeed

                accelerator = deepspeed.get_accelerator()
                self.stack.enter_context(patch.object(accelerator, "is_fp16_supported", lambda: True))
            self.stack.enter_context(DeepSpeedBackend().session(TrainingOptions(dtype=self.dtype)))
            return super().train()

    def wrap(self, model: Any) -> Any:
        import deepspeed

        [optimizer] = super().make_optimizers()
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=self.config())[0]
        self.after_initialize()
        return self.engine

    def after_initialize(self) -> None:
        if self.dtype is torch.float64:
            self.engine.communication_data_type = torch.float64  # float32 by default

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 8 // self.run.dp // self.accumulate,
            "gradient_accumulation_steps": self.configured or self.accumulate,
            "gradient_clipping": self.clip or 0.0,
            "zero_optimization": {"stage": self.zero, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "tensor_parallel": {"autotp_size": self.run.tp},
            "steps_per_print": 1_000_000,
        }
        if self.dtype is torch.bfloat16:
            config["bf16"] = {"enabled": True}
        if self.dtype is torch.float16:
            config["fp16"] = {"enabled": True, "initial_scale_power": self.scale_power, "hysteresis": 1}
        return config

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.engine.optimizer]

    def recorded_optimizer(self) -> Any:
        return None

    def train_step(self, step: int) -> None:
        for tokens, labels in self.micro_batches(step):
            self.engine.backward(self.loss(tokens, labels))
            self.engine.step()

    def weights(self) -> Weights:
        import deepspeed

        weights = {}
        for name, parameter in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero == 3):
                weights[name] = parameter.detach().clone()
        return weights
