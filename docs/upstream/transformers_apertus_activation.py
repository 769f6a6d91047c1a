"""Apertus' plan leaves the gradients of its trainable activation partial: each rank has the term of its own neurons.

torchrun --nproc-per-node 2 docs/upstream/transformers_apertus_activation.py
Seen with transformers 5.23.0, torch 2.13.0. The Trainer averages such gradients: half of what is right.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from transformers import ApertusConfig, ApertusForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
reference = ApertusForCausalLM(ApertusConfig(**sizes, num_key_value_heads=4)).train()
tokens = torch.randint(1000, (2, 16))
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
reference.save_pretrained(folder[0])  # the first rank writes
dist.barrier()
model = ApertusForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2)).train()
for trained in (reference, model):
    trained(tokens, labels=tokens).loss.backward()
expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
for name, parameter in model.named_parameters():
    if "alpha" in name:
        of_ranks = [torch.empty_like(parameter.grad) for _ in range(2)]
        dist.all_gather(of_ranks, parameter.grad)
        off, sum_off, mean_off = (
            float((gradient - expected[name]).norm() / expected[name].norm())
            for gradient in (parameter.grad, sum(of_ranks), sum(of_ranks) / 2)
        )
        if dist.get_rank() == 0:
            print(f"{name}: off by {off:.0%}, the ranks' sum by {sum_off:.0e}, their mean by {mean_off:.0%}")
dist.destroy_process_group()
