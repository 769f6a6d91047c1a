"""DoRA on a sharded model, and merging a LoRA adapter into it, end in an error: peft mixes whole and sharded tensors.

torchrun --nproc-per-node 2 docs/upstream/transformers_dora_and_merging.py
Seen with peft 0.21.2, transformers 5.23.0, torch 2.13.0: of A and B one is a DTensor and the other a plain tensor, and
`get_delta_weight` and DoRA's `get_weight_norm` multiply them, or add them to the weight.
"""
# ruff: noqa: T201

import tempfile
from collections.abc import Callable

import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
whole = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000))
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
whole.save_pretrained(folder[0])  # the first rank writes
dist.barrier()


def adapted(**options: bool) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **options))


def show(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except RuntimeError as error:
        print(f"rank {dist.get_rank()}, {what}: {type(error).__name__}: {error}")


show("DoRA", lambda: adapted(use_dora=True))
show("merging", lambda: adapted().merge_and_unload())
dist.destroy_process_group()
