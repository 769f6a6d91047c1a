"""Training loops of transformers' Trainer, recorded by its callback."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from tests.runs.loops.huggingface import CausalTraining
from tests.runs.loops.loop import Weights


class WithTrainer(CausalTraining):
    """The Trainer's loop over the batches of the loop by hand, in their order.

    Attributes:
        decay: The Trainer's schedule.
    """

    dtype = torch.float32
    decay = "constant"

    def train(self) -> Weights:
        from torch.utils.data import SequentialSampler
        from transformers import Trainer, TrainingArguments

        import tpcheck

        class InOrder(Trainer):  # type: ignore[misc]  # transformers is untyped here
            def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
                return SequentialSampler(samples)  # type: ignore[arg-type]

        self.model = self.build()
        rows = [tokens for step in range(self.steps) for tokens in self.tokens(step)]
        samples = [{"input_ids": row, "labels": row} for row in rows]
        options = dict(self.optimizer_options)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=self.steps,
                per_device_train_batch_size=len(rows) // self.steps,
                learning_rate=options["lr"],
                optim="sgd",
                lr_scheduler_type=self.decay,
                max_grad_norm=0.0,
                use_cpu=True,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            )
            record = None if self.run.path is None else {"path": self.run.path, **self.run.options}
            callback = tpcheck.TpcheckCallback(record=record, topology=self.run.rank.topology)
            InOrder(self.model, arguments, train_dataset=samples, callbacks=[callback]).train()
        return self.weights()


class DecaysByDefault(WithTrainer):
    """The Trainer's rate falls to zero over the steps, unless it is told otherwise."""

    decay = "linear"
