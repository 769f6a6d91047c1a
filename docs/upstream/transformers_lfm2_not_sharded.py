"""LFM2's plan names only the head, which is tied to the embedding: with tp_size=2 each rank keeps the full model.

torchrun --nproc-per-node 2 docs/upstream/transformers_lfm2_not_sharded.py
Seen with transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from transformers import Lfm2Config, Lfm2ForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
reference = Lfm2ForCausalLM(Lfm2Config(**sizes, num_key_value_heads=4, layer_types=["conv", "full_attention"]))
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
reference.save_pretrained(folder[0])  # the first rank writes
dist.barrier()
model = Lfm2ForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
full_count = sum(parameter.numel() for parameter in reference.parameters())
local = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in model.parameters()]
print(f"rank {dist.get_rank()} of 2 holds {sum(part.numel() for part in local)} of {full_count} parameters")
is_tied = model.lm_head.weight is model.model.embed_tokens.weight
if dist.get_rank() == 0:
    print(f"the plan: {model.tp_plan}; the head is the embedding: {is_tied}")
dist.destroy_process_group()
