"""With DeepSpeed, the optimizer that the Trainer is given as `optimizers` is dropped, silently.

DS_ACCELERATOR=cpu LOCAL_SIZE=1 torchrun --nproc-per-node 1 docs/upstream/deepspeed_trainer_drops_optimizers.py
Seen with transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8: `deepspeed_init` in integrations/deepspeed.py sets
`trainer.optimizer = None`, with or without an optimizer in DeepSpeed's configuration.
"""
# ruff: noqa: T201

import tempfile

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}
settings = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_strategy": "no"}
settings |= {"report_to": "none", "disable_tqdm": True, "log_level": "error", "learning_rate": 0.004}
BASE = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 0}}
data = [{"input_ids": row, "labels": row} for row in torch.arange(128).reshape(8, 16)]


def stepped_by(config: dict) -> str:
    """Return the kind of optimizer that trains, when the Trainer is given SGD."""
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = TrainingArguments(tempfile.mkdtemp(), deepspeed={**BASE, **config}, **settings)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(sgd, None))
    trainer.train()
    optimizer = trainer.deepspeed.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return type(optimizer).__name__


adam = {"optimizer": {"type": "Adam", "params": {"lr": 0.004, "torch_adam": True}}}
print(f"given SGD, it trains by {stepped_by({})}; with an optimizer in the configuration by {stepped_by(adam)}")
