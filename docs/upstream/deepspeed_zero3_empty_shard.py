"""With ZeRO-3 the forward pass fails on a rank whose shard of a layer is empty.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_zero3_empty_shard.py
Fewer key-value heads than TP ranks give such shards. Seen with deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}
torch.manual_seed(0)
tokens = torch.randint(1000, (2, 16))
for stage in (2, 3):
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
    settings = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}
    settings |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    settings |= {"zero_force_ds_cpu_optimizer": False}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
    outcome = "right"
    try:
        engine.backward(engine(tokens, labels=tokens).loss)
    except AssertionError as error:
        outcome = f"AssertionError: {error}"
    print(f"ZeRO-{stage}, rank {torch.distributed.get_rank()}: {outcome}")
    if outcome != "right":
        break
