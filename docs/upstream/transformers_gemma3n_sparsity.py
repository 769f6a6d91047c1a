"""Gemma 3n's sparse activation takes mean and deviation over the neurons of one rank instead of all neurons.

torchrun --nproc-per-node 2 docs/upstream/transformers_gemma3n_sparsity.py
Seen with transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
sizes |= {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 1000, "vocab_size_per_layer_input": 1000}
sizes |= {"hidden_size_per_layer_input": 16, "laurel_rank": 4, "num_kv_shared_layers": 0, "pad_token_id": 0}
layers = {"layer_types": ["sliding_attention", "full_attention"], "use_cache": False}
tokens = torch.randint(1000, (2, 16))
for sparsity in (0.5, 0.0):
    config = Gemma3nTextConfig(**sizes, **layers, activation_sparsity_pattern=[sparsity, 0.0])
    reference = Gemma3nForCausalLM(config)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    reference.save_pretrained(folder[0])  # the first rank writes
    dist.barrier()
    model = Gemma3nForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
    unsharded = Gemma3nForCausalLM.from_pretrained(folder[0])
    with torch.no_grad():
        actual, expected = model(tokens).logits, unsharded(tokens).logits
    if dist.get_rank() == 0:
        print(f"sparsity {sparsity}: logits off by {float((actual - expected).norm() / expected.norm()):.1e}")
dist.destroy_process_group()
