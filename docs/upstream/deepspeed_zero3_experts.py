"""Under ZeRO 3, ranks whose tokens take another number of experts gather other weights: DBRX's forward pass fails.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 TORCH_DISTRIBUTED_DEBUG=DETAIL \\
    torchrun --nproc-per-node 2 docs/upstream/deepspeed_zero3_experts.py [leaf]
With deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0. ZeRO 3 gathers a module's weights at each of its calls, and
DbrxExperts calls its `mlp` once for each expert that a token of the rank takes. DETAIL compares what the ranks gather.
Blocks of Mixtral, Qwen2-MoE and Qwen3-MoE are leaf modules by default, gathered once; with `leaf`, so is this.
"""
# ruff: noqa: T201

import sys

import deepspeed
import torch
from transformers import DbrxConfig, DbrxForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
experts = {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 1}
attention = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}
sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 1000, "max_seq_len": 64}
model = DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=experts)).train()
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
if "leaf" in sys.argv:
    zero["leaf_module"] = {"classes": ["transformers.models.dbrx.modeling_dbrx.DbrxExperts"]}
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
config |= {"zero_force_ds_cpu_optimizer": False}
engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)[0]
rank = torch.distributed.get_rank()
tokens = torch.arange(16 if rank else 1)[None] * 7  # the one token of the first rank takes one expert
try:
    outcome = f"logits of norm {float(engine(tokens, use_cache=False).logits.norm()):.3f}"
except RuntimeError as error:
    outcome = f"RuntimeError: {error}"
print(f"rank {rank}: {outcome}")
