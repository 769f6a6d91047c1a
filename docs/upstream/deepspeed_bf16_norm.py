"""In bfloat16 without ZeRO, gradients are clipped by the norm of the shards of one TP rank.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_bf16_norm.py
Seen with deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4)).bfloat16()
tokens = torch.randint(1000, (2, 16))
reference = copy.deepcopy(model)
reference(tokens, labels=tokens).loss.backward()
expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
right = torch.stack([gradient.float().norm() for gradient in expected.values()]).norm()
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "tensor_parallel": {"autotp_size": 2},
}
settings |= {"zero_allow_untested_optimizer": True}
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
engine.backward(engine(tokens, labels=tokens).loss)
engine.step()
print(f"clips by a norm of {float(engine.get_global_grad_norm()):.4f}, should be {float(right):.4f}")
