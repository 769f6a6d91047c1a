"""megatron-core's ColumnParallelLinear gives its bias no gradient where its weight is frozen.

torchrun --nproc-per-node 2 docs/upstream/megatron_frozen_weight_bias.py
`LinearWithFrozenWeight.backward` returns None for the bias, as if it were frozen, too. Seen with megatron-core 0.16.1.
"""
# ruff: noqa: T201

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear

dist.init_process_group("gloo")
config = ModelParallelConfig(tensor_model_parallel_size=2, use_cpu_initialization=True)
for frozen in (False, True):
    group = dist.group.WORLD
    layer = ColumnParallelLinear(3, 4, config=config, init_method=torch.nn.init.normal_, tp_group=group)
    layer.weight.requires_grad_(not frozen)
    output, _ = layer(torch.randn(2, 1, 3, requires_grad=True))
    output.sum().backward()
    print(f"weight frozen: {frozen}, rank {dist.get_rank()}: bias trains, its gradient is {layer.bias.grad}")
dist.destroy_process_group()
