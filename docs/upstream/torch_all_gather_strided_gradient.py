"""Over gloo, the gradient of torch.distributed.nn.functional.all_gather is wrong where the incoming one is strided.

python docs/upstream/torch_all_gather_strided_gradient.py
Seen with torch 2.13.0: `_AllGather.backward` receives into `empty_like` of the incoming gradient, which keeps its
strides (heads transposed after the gather), and gloo's scatter fills such a tensor wrongly (pytorch issue 192920).
NCCL takes another way.
"""
# ruff: noqa: T201

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.nn.functional import all_gather


def gradient(rank, transposed):
    """Sum over 2 ranks of each one's gradient, of which this rank gets its half: it is 1 + 2 times that of rank 0."""
    whole = torch.arange(24.0).reshape(2, 4, 3) * (1 + rank)
    shard = torch.zeros(2, 2, 3, requires_grad=True)
    gathered = torch.cat(all_gather(shard), 1)
    if transposed:  # the same numbers in another order of memory
        whole = whole.transpose(1, 2).contiguous().transpose(1, 2)
    gathered.backward(whole)
    expected = 3 * torch.arange(24.0).reshape(2, 4, 3).chunk(2, 1)[rank]
    return float((shard.grad - expected).abs().max())


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    errors = gradient(rank, transposed=False), gradient(rank, transposed=True)
    print(f"rank {rank}: largest error {errors[0]}, with a transposed gradient {errors[1]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (f"{folder}/store",), nprocs=2)
