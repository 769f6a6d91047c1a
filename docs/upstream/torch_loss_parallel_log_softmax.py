"""Under torch's loss_parallel, the backward of log_softmax returns the gradient as it is.

python docs/upstream/torch_loss_parallel_log_softmax.py
Seen with torch 2.13.0: `_log_softmax_backward_handler` (distributed/tensor/parallel/loss.py) is right for cross_entropy
alone, whose own backward has taken the softmax into account. One process shows it.
"""
# ruff: noqa: T201

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
logits, targets = torch.randn(3, 8), torch.randn(3, 8).softmax(-1)


def gradient(parallel):
    leaf = logits.clone().requires_grad_()
    if not parallel:
        (-(functional.log_softmax(leaf, -1) * targets).sum()).backward()
        return leaf.grad
    with loss_parallel():
        shard = DTensor.from_local(leaf, mesh, [Shard(1)])
        log_probabilities = functional.log_softmax(shard, -1)
        loss = -(log_probabilities * distribute_tensor(targets, mesh, [Shard(1)])).sum()
        loss.full_tensor().backward()
    return leaf.grad


expected, actual = gradient(False), gradient(True)
print("largest difference of the gradients:", float((actual - expected).abs().max()))
print("the gradient is that of the targets alone:", torch.allclose(actual, -targets))
dist.destroy_process_group()
