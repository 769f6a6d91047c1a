"""packed_colwise of transformers shards the weight of a fused layer as two blocks and the bias as one: they do not fit.

torchrun --nproc-per-node 2 docs/upstream/transformers_packed_colwise_bias.py
`PackedColwiseParallel.shard_param` gives a bias a plain `Shard`. Seen with transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
rank = torch.distributed.get_rank()
torch.manual_seed(0)
hidden = torch.randn(3, 4)
for bias in (False, True):
    plain = torch.nn.Linear(4, 8, bias=bias)  # gate and up, four rows each
    sharded = copy.deepcopy(plain)
    for name, _ in list(sharded.named_parameters()):
        ALL_PARALLEL_STYLES["packed_colwise"].shard_param(sharded, name, mesh)
    ALL_PARALLEL_STYLES["packed_colwise"].install_forward(sharded, mesh)
    gate, up = plain(hidden).chunk(2, dim=-1)
    expected = torch.cat([gate.chunk(2, dim=-1)[rank], up.chunk(2, dim=-1)[rank]], dim=-1)
    off = float(((sharded(hidden) - expected).norm() / expected.norm()).detach())
    print(f"bias={bias}, rank {rank}: output off by {off:.0%}")
