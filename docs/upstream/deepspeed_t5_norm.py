"""T5's bias of relative positions is cut, and not marked: the norm that clips counts the shard of TP rank 0 alone.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_t5_norm.py
Seen with deepspeed 0.19.8, transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import deepspeed
import torch
from transformers import T5Config, T5ForConditionalGeneration

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
sizes = {"d_model": 64, "d_kv": 8, "d_ff": 128, "num_layers": 2, "num_heads": 8, "dropout_rate": 0.0}
config = T5Config(**sizes, vocab_size=128, decoder_start_token_id=0)
model = T5ForConditionalGeneration(config).float()
tokens = torch.randint(128, (2, 16))
reference = copy.deepcopy(model)
reference(input_ids=tokens, labels=tokens).loss.backward()
right = torch.stack([parameter.grad.norm() for parameter in reference.parameters()]).norm()
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.01,
    "tensor_parallel": {"autotp_size": 2},
    "zero_allow_untested_optimizer": True,
}
engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=settings)[0]
norm = engine.module.decoder.final_layer_norm.weight  # whole on each rank
before, gradient = norm.detach().clone(), reference.decoder.final_layer_norm.weight.grad
engine.backward(engine(input_ids=tokens, labels=tokens).loss)
engine.step()
clipped_by = 0.01 * gradient.norm() / (before - norm.detach()).norm()
shape = tuple(engine.module.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape)
print(f"bias of shape {shape}; clips by a norm of {float(clipped_by):.5f}, should be {float(right):.5f}")
