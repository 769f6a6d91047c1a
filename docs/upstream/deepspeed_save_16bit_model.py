"""save_16bit_model writes the shards of TP rank 0 as if they were the model.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_save_16bit_model.py
Seen with deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import shutil
import tempfile

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4))
shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
settings = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}
settings |= {"zero_allow_untested_optimizer": True}
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
folder = tempfile.gettempdir() + "/saved-by-deepspeed"
engine.save_16bit_model(folder, "model.bin")
if torch.distributed.get_rank() == 0:
    saved = torch.load(folder + "/model.bin")
    shutil.rmtree(folder)
    wrong = {name: tuple(tensor.shape) for name, tensor in saved.items() if tuple(tensor.shape) != shapes[name]}
    print(f"{len(wrong)} of {len(saved)} saved tensors have a wrong shape")
    print("lm_head.weight is", wrong.get("lm_head.weight"), "and should be", shapes["lm_head.weight"])
