"""With tp_overlap_comm the backward pass of a column-parallel layer fails on a gradient that is not contiguous.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_overlap_strided_gradient.py
`AsyncColumnParallel.backward` calls `grad_output.view(...)`. Seen with deepspeed 0.19.8, torch 2.13.0.
"""
# ruff: noqa: T201

import deepspeed
import torch
from deepspeed.module_inject.layers import LinearLayer, TensorParallel_Layer, set_autotp_mode

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
deepspeed.init_distributed("gloo", verbose=False)
set_autotp_mode(training=True)
TensorParallel_Layer.tp_overlap_comm = True  # what the configuration's tensor_parallel.tp_overlap_comm sets
layer = LinearLayer(torch.nn.Linear(4, 4, bias=False), torch.distributed.new_group([0, 1]))
output = layer(torch.randn(3, 5, 4, requires_grad=True))
gradient = torch.ones(3, 2, 5).transpose(-1, -2)  # as behind `output.transpose(-1, -2)`
try:
    output.backward(gradient)
except RuntimeError as error:
    print(f"rank {torch.distributed.get_rank()}: {error}")
