"""AutoTP cuts Persimmon's fused query_key_value in another family's layout: every head reads rows of other heads.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_persimmon_qkv.py
Seen with deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import deepspeed
import torch
from transformers import PersimmonConfig, PersimmonForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
config = PersimmonConfig(**sizes)
config.hidden_dropout = config.attention_dropout = 0.0
model = PersimmonForCausalLM(config)
tokens = torch.randint(1000, (2, 16))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(10 if parameter.dim() > 1 else 1)  # the usual 0.02 hides attention
    expected = copy.deepcopy(model)(tokens).logits
settings = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}
settings |= {"zero_allow_untested_optimizer": True}
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
model.eval()
actual = engine(tokens).logits
if torch.distributed.get_rank() == 0:
    print(f"logits off by {float((actual - expected).norm() / expected.norm()):.1%}")
