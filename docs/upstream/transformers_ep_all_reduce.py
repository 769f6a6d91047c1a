"""Expert parallelism by all_reduce of transformers: a rank whose experts get no token skips reductions of the backward.

torchrun --nproc-per-node 2 docs/upstream/transformers_ep_all_reduce.py
Its experts return zeros without a graph. Here each rank skips those of another layer: reductions of different layers
meet, without an error. Seen with transformers 5.23.0, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import MixtralConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
torch.manual_seed(0)
config = MixtralConfig(hidden_size=3, intermediate_size=4, num_local_experts=2, experts_implementation="eager")
plain = [MixtralExperts(config) for _ in range(2)]
for layer in plain:
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)


def gradient(layers: list[MixtralExperts]) -> torch.Tensor:
    hidden = torch.ones(4, 3, requires_grad=True)
    first = hidden + layers[0](hidden, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))  # all to expert 0
    (first + layers[1](first, torch.ones(4, 1, dtype=torch.int64), torch.ones(4, 1))).sum().backward()  # and 1
    return hidden.grad


for name in ("all_to_all", "all_reduce"):
    sharded = copy.deepcopy(plain)
    for layer in sharded:
        for parameter in ("gate_up_proj", "down_proj"):
            ALL_PARALLEL_STYLES["grouped_gemm"].shard_param(layer, parameter, mesh)
        ALL_PARALLEL_STYLES["ep_dispatch_experts"].install_forward(layer, mesh, tp_mesh=mesh, ep_implementation=name)
    off = float((gradient(sharded) - gradient(plain)).norm() / gradient(plain).norm())
    print(f"{name}, rank {mesh.get_rank()}: gradient of the input off by {off:.0%}")
