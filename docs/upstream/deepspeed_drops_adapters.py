"""AutoTP drops the LoRA adapters of a peft model, without a word: the loss is the base model's.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_drops_adapters.py
Seen with deepspeed 0.19.8, peft 0.21.2, transformers 5.23.0, torch 2.13.0: the plan's names match peft's `LoraLayer`,
which has a weight, and AutoTP replaces it by its own linear layer.
"""
# ruff: noqa: T201

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=1000))
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter)
tokens = torch.randint(1000, (2, 16))
with torch.no_grad():
    loss = model(tokens, labels=tokens).loss
    with model.disable_adapter():
        loss_of_base = model(tokens, labels=tokens).loss
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
settings = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}
sgd = torch.optim.SGD(trainable, lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=sgd, config={**settings, "zero_allow_untested_optimizer": True})[0]
engine.eval()
with torch.no_grad():
    loss_of_engine = engine(tokens, labels=tokens).loss
left = [name for name, _ in engine.module.named_parameters() if "lora" in name]
print(
    f"rank {torch.distributed.get_rank()}: loss {loss:.6f} with adapters, {loss_of_base:.6f} without, "
    f"{loss_of_engine:.6f} under AutoTP, which has {len(left)} of {len(trainable)} adapter tensors"
)
