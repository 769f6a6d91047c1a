"""With `average_tokens_across_devices=False` the Trainer divides the loss of a TP group by its labels over `tp_size`.

torchrun --nproc-per-node 2 docs/upstream/transformers_trainer_local_count.py
Seen with transformers 5.23.0: `_get_num_items_in_batch` gathers the count only where the option is set, and divides by
the size of the TP group in any case, so that loss, gradients and the logged loss are `tp_size` times too large.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

ParallelismConfig._validate_accelerator = lambda *_: None  # it asks for GPUs; nothing below needs them
dist.init_process_group("gloo")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000)).save_pretrained(folder[0])  # the first rank writes
dist.barrier()
model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
tokens = torch.arange(128).reshape(8, 16)
with torch.no_grad():
    expected = float(model(tokens, labels=tokens).loss)
for average in (True, False):
    settings = {"max_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings |= {"average_tokens_across_devices": average, "logging_steps": 1, "learning_rate": 0.0}
    arguments = TrainingArguments(folder[0], per_device_train_batch_size=8, log_level="error", **settings)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    if dist.get_rank() == 0:
        logged = trainer.state.log_history[0]["loss"]
        print(f"average_tokens_across_devices={average}: logs a loss of {logged:.4f}, should be {expected:.4f}")
dist.destroy_process_group()
