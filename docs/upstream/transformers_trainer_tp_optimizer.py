"""A `Trainer` whose model is tensor-parallel saves TP rank 0's optimizer state for all ranks, if a callback saves.

torchrun --nproc-per-node 2 docs/upstream/transformers_trainer_tp_optimizer.py
Seen with transformers 5.23.0: `Trainer` refuses `save_strategy="steps"` for such a model, but saves where a callback
sets `control.should_save`; `_save_optimizer_and_scheduler` writes the first process's state, beside whole weights.
"""
# ruff: noqa: T201

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

ParallelismConfig._validate_accelerator = lambda *_: None  # it asks for GPUs; nothing below needs them
dist.init_process_group("gloo")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000)).save_pretrained(folder[0])  # the first rank writes
dist.barrier()
tokens = torch.arange(128).reshape(8, 16).tolist()
saving = TrainerCallback()
saving.on_step_end = lambda args, state, control, **_: setattr(control, "should_save", True)
options = {"max_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
data = [{"input_ids": row, "labels": row} for row in tokens]
Trainer(model, TrainingArguments(f"{folder[0]}/run", **options), train_dataset=data, callbacks=[saving]).train()
dist.barrier()
saved = Path(folder[0], "run", "checkpoint-1")
if dist.get_rank() == 0:
    name = next(name for name, parameter in model.named_parameters() if parameter.ndim == 2)
    moment = torch.load(saved / "optimizer.pt", weights_only=False)["state"][0]["exp_avg"]
    print(f"{name}: {list(load_file(saved / 'model.safetensors')[name].shape)} in model.safetensors")
    print(f"its exp_avg in optimizer.pt: {list(moment.to_local().shape)}, {moment.placements} of rank 0 alone")
dist.destroy_process_group()
