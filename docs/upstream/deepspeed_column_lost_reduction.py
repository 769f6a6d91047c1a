"""DeepSpeed's column-parallel layers lose the reduction of the input's gradient where it is not contiguous.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_column_lost_reduction.py
`ColumnParallel.backward` calls `all_reduce(grad_output.contiguous())` and returns `grad_output`: a copy is reduced.
torch makes a transposed gradient for a transposed input. Seen with deepspeed 0.19.8, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import deepspeed
import torch
from deepspeed.module_inject.layers import LinearLayer, set_autotp_mode

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
deepspeed.init_distributed("gloo", verbose=False)
set_autotp_mode(training=True)
torch.manual_seed(0)
plain = torch.nn.Linear(2, 2, bias=False)
group = torch.distributed.new_group([0, 1])
sharded = LinearLayer(copy.deepcopy(plain), group)
numbers = torch.randn(2, 2)
for name, given in (("contiguous", numbers.clone()), ("transposed", numbers.t().contiguous().t())):
    expected, actual = given.clone().requires_grad_(), given.detach().requires_grad_()
    gradient = torch.ones(2, 2)
    plain(expected).backward(gradient)
    rank = torch.distributed.get_rank()
    sharded(actual).backward(gradient[:, rank : rank + 1])
    of_ranks = [torch.empty(2, 2) for _ in range(2)]
    torch.distributed.all_gather(of_ranks, actual.grad.contiguous())
    off = float((actual.grad - expected.grad).norm() / expected.grad.norm())
    sum_off = float((sum(of_ranks) - expected.grad).norm() / expected.grad.norm())
    if rank == 0:
        print(f"{name} input: gradient off by {off:.0%}, the ranks' sum by {sum_off:.0e}")
