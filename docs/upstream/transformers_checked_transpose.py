"""Loading Qwen3-VL-MoE with TP cuts its experts before it asks by their shape whether to transpose them: it fails.

torchrun --nproc-per-node 2 docs/upstream/transformers_checked_transpose.py
Seen with transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import tempfile

import torch.distributed as dist
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000, **heads, **experts}
vision = {"hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 8, "out_hidden_size": 64}
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
config = Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder[0])  # rank 0 writes
dist.barrier()
Qwen3VLMoeForConditionalGeneration.from_pretrained(folder[0])
print("unsharded: loaded")
try:
    Qwen3VLMoeForConditionalGeneration.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
    print("sharded: loaded")
except RuntimeError as error:
    print(f"sharded: {error}")
dist.destroy_process_group()
