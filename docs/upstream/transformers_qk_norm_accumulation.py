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
    for number in range(micro_batches):
        tokens = torch.randint(1000, (2, 16), generator=torch.Generator().manual_seed(number))
        model(tokens, labels=tokens).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if name.endswith("norm.weight")}


dist.init_process_group("gloo")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8}
for model_type in sys.argv[1:] or ["qwen3"]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=4, vocab_size=1000, pad_token_id=0)
    reference, folder = AutoModelForCausalLM.from_config(config).float().train(), [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    reference.save_pretrained(folder[0])  # the first rank writes
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2)).train()
    for micro_batches in (1, 2, 3):
        actual, expected = gradients(model, micro_batches), gradients(reference, micro_batches)
        off = {name: float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
        if dist.get_rank() == 0:
            print(model_type, micro_batches, {name: f"{error:.0%}" for name, error in off.items() if error > 0.01})
