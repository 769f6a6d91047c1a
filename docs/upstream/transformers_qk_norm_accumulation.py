"""With k micro-batches a step, q_norm's and k_norm's gradients are summed over the TP group again and again.

torchrun --nproc-per-node 2 docs/upstream/transformers_qk_norm_accumulation.py [qwen3] [exaone4] [dots1] ...
Seen with transformers 5.23.0, torch 2.13.0: a plan's style `replicated_with_grad_allreduce` reduces the accumulated
`.grad` after each backward pass (`register_post_accumulate_grad_hook`), in place of what that pass adds.
"""
# ruff: noqa: T201

import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def gradients(model, micro_batches):
    model.zero_grad()
    for tokens in torch.randint(1000, (micro_batches, 2, 16), generator=torch.Generator().manual_seed(0)):
        model(tokens, labels=tokens).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if name.endswith("norm.weight")}


dist.init_process_group("gloo")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8}
sizes |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}  # dots1 has no defaults for these
for model_type in sys.argv[1:] or ["qwen3"]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=4, vocab_size=1000, pad_token_id=0)
    reference = AutoModelForCausalLM.from_config(config).float().train()
    dist.broadcast_object_list(folder := [tempfile.mkdtemp()])
    reference.save_pretrained(folder[0])  # the first rank writes
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2)).train()
    for micro_batches in (1, 2, 3):
        actual, expected = gradients(model, micro_batches), gradients(reference, micro_batches)
        off = {name: float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
        if dist.get_rank() == 0:
            print(model_type, micro_batches, {name: f"{x:.0%}" for name, x in off.items() if x > 0.01})
