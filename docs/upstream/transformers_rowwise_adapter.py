"""A LoRA adapter on a row-parallel layer (o_proj, down_proj) fails in the forward pass; on other layers it runs.

torchrun --nproc-per-node 2 docs/upstream/transformers_rowwise_adapter.py
Seen with peft 0.21.2, transformers 5.23.0, torch 2.13.0: peft makes `lora_A` with the width of this rank's shard, and
`RowwiseParallel.transform_inputs_pre_forward` takes `in_features` for the width of the whole input.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
whole = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=1000))
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
whole.save_pretrained(folder[0])  # the first rank writes
dist.barrier()
tokens = torch.randint(1000, (2, 16), generator=torch.Generator().manual_seed(0))
for target in ("q_proj", "o_proj"):
    base = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[target])).train()
    try:
        print(f"{target}: loss {float(model(input_ids=tokens, labels=tokens).loss.detach()):.4f}")
    except RuntimeError as error:
        print(f"{target}: {type(error).__name__}: {error}")
dist.destroy_process_group()
