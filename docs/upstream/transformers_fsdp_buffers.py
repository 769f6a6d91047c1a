"""With FSDP, from_pretrained leaves Falcon-H1's `mup_vector` as the memory was: outputs are arbitrary.

torchrun --nproc-per-node 2 docs/upstream/transformers_fsdp_buffers.py
Seen with transformers 5.23.0, torch 2.13.0. The buffer is not in the file; `FalconH1Model._init_weights` fills it.
`fully_shard` makes the class `FSDPFalconH1ForCausalLM` of a module of torch, so that `is_custom_code()` says True, and
`_initialize_weights` skips every module that has no tensor of its own, as FalconH1Model: `all()` of none is True.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from transformers import FalconH1Config, FalconH1ForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)  # fills memory that nothing has written with NaN
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes |= {"num_key_value_heads": 2, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
tokens = torch.randint(1000, (2, 16))
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
reference = FalconH1ForCausalLM(FalconH1Config(**sizes, vocab_size=1000)).eval()
reference.save_pretrained(folder[0])  # the first rank writes
dist.barrier()
for axis in ("tp_size", "fsdp_size"):
    model = FalconH1ForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(**{axis: 2})).eval()
    actual, expected = (each.model.layers[0].mamba.mup_vector for each in (model, reference))
    off = float((model(tokens).logits - reference(tokens).logits).norm() / reference(tokens).logits.norm())
    if dist.get_rank() == 0:
        print(f"{axis}=2, {type(model).__name__}, is_custom_code() {model.is_custom_code()}:")
        print(
            f"  mup_vector {actual[0, 0, :3].tolist()}, expected {expected[0, 0, :3].tolist()}; logits off by {off:.0%}"
        )
dist.destroy_process_group()
