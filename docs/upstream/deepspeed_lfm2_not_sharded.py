"""AutoTP accepts autotp_size=2 for LFM2, and every rank keeps the full model.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_lfm2_not_sharded.py
Seen with deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import deepspeed
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
layers = ["conv", "full_attention"]
model = Lfm2ForCausalLM(Lfm2Config(**sizes, num_key_value_heads=4, layer_types=layers))
full_count = sum(parameter.numel() for parameter in model.parameters())
settings = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}
settings |= {"zero_allow_untested_optimizer": True}
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
local_count = sum(parameter.numel() for parameter in engine.module.parameters())
print(f"rank {torch.distributed.get_rank()} of 2 holds {local_count} of {full_count} parameters")
