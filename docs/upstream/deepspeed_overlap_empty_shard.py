"""With tp_overlap_comm the backward pass of a column-parallel layer fails on a rank whose shard is empty.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_overlap_empty_shard.py
One key-value head on two ranks gives such a shard. Without tp_overlap_comm the results are right.
`AsyncColumnParallel.backward` calls `view(-1, 0)`. Seen with deepspeed 0.19.8, torch 2.13.0.
"""
# ruff: noqa: T201

import deepspeed
import torch
from deepspeed.module_inject.layers import LinearLayer, TensorParallel_Layer, set_autotp_mode

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
deepspeed.init_distributed("gloo", verbose=False)
set_autotp_mode(training=True)
group = torch.distributed.new_group([0, 1])
for overlaps in (False, True):
    TensorParallel_Layer.tp_overlap_comm = overlaps  # what tensor_parallel.tp_overlap_comm of the configuration sets
    layer = LinearLayer(torch.nn.Linear(4, 1, bias=False), group)  # one output: the second rank has none
    outcome = "right"
    try:
        layer(torch.randn(3, 4, requires_grad=True)).sum().backward()
    except RuntimeError as error:
        outcome = str(error)
    print(f"tp_overlap_comm={overlaps}, rank {torch.distributed.get_rank()}: {outcome}")
