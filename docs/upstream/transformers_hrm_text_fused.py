"""Loading HRM with TP shards its fused projections before it splits them: each projection gets rows of others.

torchrun --nproc-per-node 2 docs/upstream/transformers_hrm_text_fused.py
Seen with transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from transformers import HrmTextConfig, HrmTextForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8}
tokens = torch.randint(1000, (2, 16))
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
HrmTextForCausalLM(HrmTextConfig(**sizes, vocab_size=1000, use_cache=False)).save_pretrained(folder[0])  # rank 0 writes
dist.barrier()
unsharded = HrmTextForCausalLM.from_pretrained(folder[0])
model = HrmTextForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
actual, expected = model(tokens).logits, unsharded(tokens).logits
layer, reference = model.model.L_module.layers[0], unsharded.model.L_module.layers[0]
for name, parameter in layer.named_parameters():
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    off = float((full - reference.get_parameter(name)).norm() / reference.get_parameter(name).norm())
    if dist.get_rank() == 0:
        print(f"{name}: off by {off:.0%}")
if dist.get_rank() == 0:
    print(f"logits: off by {float((actual - expected).norm() / expected.norm()):.0%}")
dist.destroy_process_group()
