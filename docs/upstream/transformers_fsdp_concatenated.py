"""With FSDP, Kimi Linear's conv1d weights are cut before they are concatenated: channels get the kernels of others.

torchrun --nproc-per-node 2 docs/upstream/transformers_fsdp_concatenated.py
Seen with transformers 5.23.0, torch 2.13.0. The file has q_conv1d, k_conv1d and v_conv1d, and the conversion of
`kimi_linear` concatenates them (`Concatenate(dim=0)`). `DtensorShardOperation.shard_tensor` takes a rank's rows of each
of the three, so that rank 0 has (q0, k0, v0) where FSDP's `Shard(0)` means the first half of (q, k, v).
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from transformers import KimiLinearConfig, KimiLinearForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "linear_num_heads": 4, "linear_head_dim": 16}
sizes |= {"num_experts": 4, "num_experts_per_token": 2, "vocab_size": 1000, "use_cache": False}
special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
tokens = torch.randint(1000, (2, 16))
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
KimiLinearForCausalLM(KimiLinearConfig(**sizes, **special)).save_pretrained(folder[0])
dist.barrier()
reference = KimiLinearForCausalLM.from_pretrained(folder[0]).eval()
model = KimiLinearForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(fsdp_size=2)).eval()
pairs = {name: (parameter.full_tensor(), reference.get_parameter(name)) for name, parameter in model.named_parameters()}
pairs["logits"] = (model(tokens).logits, reference(tokens).logits)
off = {name: float((actual - expected).norm() / expected.norm()) for name, (actual, expected) in pairs.items()}
if dist.get_rank() == 0:
    print({name: f"{error:.0%}" for name, error in off.items() if error > 0.001})
dist.destroy_process_group()
