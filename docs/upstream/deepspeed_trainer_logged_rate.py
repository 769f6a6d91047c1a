"""With a scheduler in DeepSpeed's configuration the Trainer logs the learning rate of the next step.

DS_ACCELERATOR=cpu LOCAL_SIZE=1 torchrun --nproc-per-node 1 docs/upstream/deepspeed_trainer_logged_rate.py
Seen with transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8: `engine.step` steps the schedule, too, inside of
`accelerator.backward`; `Trainer._run_epoch` reads the rate after it, as that of the step.
"""
# ruff: noqa: T201

import tempfile

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}
warmup = {"warmup_max_lr": 0.004, "warmup_num_steps": 4, "warmup_type": "linear"}
config = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.004, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": warmup},
}
settings = {"max_steps": 4, "learning_rate": 0.004, "warmup_steps": 4, "logging_steps": 1, "save_strategy": "no"}
settings |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "log_level": "error"}
used = []
before = TrainerCallback()
before.on_step_begin = lambda args, state, control, optimizer, **_: used.append(optimizer.param_groups[0]["lr"])
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000))
data = [{"input_ids": row, "labels": row} for row in torch.arange(128).reshape(8, 16)]
arguments = TrainingArguments(tempfile.mkdtemp(), deepspeed=config, **settings)
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[before])
trainer.train()
logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
print(f"stepped with {used}, logged {logged}")
