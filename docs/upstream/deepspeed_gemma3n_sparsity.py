"""Gemma 3n's sparse activation takes mean and deviation over the neurons of one rank instead of all neurons.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_gemma3n_sparsity.py
Seen with deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import deepspeed
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
sizes |= {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 1000, "vocab_size_per_layer_input": 1000}
sizes |= {"hidden_size_per_layer_input": 16, "laurel_rank": 4, "num_kv_shared_layers": 0, "pad_token_id": 0}
layers = {"activation_sparsity_pattern": [0.5, 0.0], "layer_types": ["sliding_attention", "full_attention"]}
model = Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **layers, use_cache=False))
tokens = torch.randint(1000, (2, 16))
expected = copy.deepcopy(model)(tokens).logits
settings = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}
settings |= {"zero_allow_untested_optimizer": True}
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
actual = engine(tokens).logits
if torch.distributed.get_rank() == 0:
    print(f"logits off by {float((actual - expected).norm() / expected.norm()):.1%}")
