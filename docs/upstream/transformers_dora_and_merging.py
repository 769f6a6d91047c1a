"""DoRA on a sharded model, and merging a LoRA adapter into it, end in an error: peft mixes whole and sharded tensors.

torchrun --nproc-per-node 2 docs/upstream/transformers_dora_and_merging.py
Seen with peft 0.21.2, transformers 5.23.0, torch 2.13.0: of A and B one is a DTensor and the other a plain tensor, and
`get_delta_weight` and DoRA's `get_weight_norm` multiply them, or add them to the weight.
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


def adapted(**options: bool) -> torch.nn.Module:
    base = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **options))


for what, action in {"DoRA": lambda: adapted(use_dora=True), "merging": lambda: adapted().merge_and_unload()}.items():
    try:
        action()
    except RuntimeError as error:
        print(f"rank {dist.get_rank()}, {what}: {type(error).__name__}: {error}")
dist.destroy_process_group()
