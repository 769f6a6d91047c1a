"""With k micro-batches a step, q_norm and k_norm of qwen3 get what was already summed over the TP group summed again.

torchrun --nproc-per-node 2 docs/upstream/transformers_qk_norm_accumulation.py
Seen with transformers 5.23.0, torch 2.13.0: `ReplicatedWithGradAllReduce` (distributed/tensor_parallel.py) reduces the
accumulated `.grad` in `register_post_accumulate_grad_hook`, after each backward pass, instead of what that pass adds.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
reference = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=4, head_dim=8, vocab_size=1000)).train()
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
reference.save_pretrained(folder[0])  # the first rank writes
dist.barrier()
model = Qwen3ForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2)).train()
for micro_batches in (1, 2, 3):
    off = {}
    for trained in (reference, model):
        trained.zero_grad()
        for number in range(micro_batches):
            tokens = torch.randint(1000, (2, 16), generator=torch.Generator().manual_seed(number))
            trained(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            off[name] = float((parameter.grad - expected[name]).norm() / expected[name].norm())
    if dist.get_rank() == 0:
        print(
            f"{micro_batches} micro-batches: " + ", ".join(f"{name} off by {error:.0%}" for name, error in off.items())
        )
dist.destroy_process_group()
