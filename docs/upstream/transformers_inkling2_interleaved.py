"""Loading Inkling 2 with TP shards gate and up of its experts while they interleave: saving writes another model.

torchrun --nproc-per-node 2 docs/upstream/transformers_inkling2_interleaved.py
Seen with transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from transformers import Inkling2ForCausalLM, Inkling2TextConfig
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2}
sizes |= {"num_hidden_layers": 2, "vocab_size": 1000, "unpadded_vocab_size": 1000, "eos_token_id": 0, "d_rel": 8}
sizes |= dict.fromkeys(("num_attention_heads", "head_dim", "swa_num_attention_heads", "swa_head_dim"), 8)
sizes |= {"num_key_value_heads": 4, "swa_num_key_value_heads": 4, "use_cache": False}
tokens = torch.randint(1000, (2, 16))
folders = [tempfile.mkdtemp(), tempfile.mkdtemp()]
dist.broadcast_object_list(folders)
reference = Inkling2ForCausalLM(Inkling2TextConfig(**sizes))
for parameter in reference.parameters():
    dist.broadcast(torch.nn.init.normal_(parameter.data, std=0.3), 0)
reference.save_pretrained(folders[0])  # the first rank writes
dist.barrier()
sharded = Inkling2ForCausalLM.from_pretrained(folders[0], distributed_config=DistributedConfig(tp_size=2))
sharded.save_pretrained(folders[1])
dist.barrier()
for name, model in (("sharded", sharded), ("saved again", Inkling2ForCausalLM.from_pretrained(folders[1]))):
    with torch.no_grad():
        off = float((model(tokens).logits - reference(tokens).logits).norm() / reference(tokens).logits.norm())
    if dist.get_rank() == 0:
        print(f"{name}: logits off by {off:.1e}")
dist.destroy_process_group()
