"""AutoTP leaves the gradients of Apertus' trainable activation partial: each rank has the term of its own neurons.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_apertus_activation.py
Seen with deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import deepspeed
import torch
from transformers import ApertusConfig, ApertusForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
model = ApertusForCausalLM(ApertusConfig(**sizes, num_key_value_heads=4))
tokens = torch.randint(1000, (2, 16))
reference = copy.deepcopy(model)
reference(tokens, labels=tokens).loss.backward()
expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
settings = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}
settings |= {"zero_allow_untested_optimizer": True}
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
engine.backward(engine(tokens, labels=tokens).loss)
for name, parameter in engine.module.named_parameters():
    if "alpha" in name:
        of_ranks = [torch.empty_like(parameter.grad) for _ in range(2)]
        torch.distributed.all_gather(of_ranks, parameter.grad)
        off = float((parameter.grad - expected[name]).norm() / expected[name].norm())
        sum_off = float((sum(of_ranks) - expected[name]).norm() / expected[name].norm())
        if torch.distributed.get_rank() == 0:
            print(f"{name}: off by {off:.0%}, the ranks' sum by {sum_off:.0e}")
