"""What transformers' Trainer adds to a model that was sharded when it was loaded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def sync_replicated_parameters(model: nn.Module) -> None:
    """Broadcast plain parameters from the first rank, and average their gradients over all ranks.

    The same as `Trainer._sync_replicated_trainable_parameters` of transformers 5.23, whose hooks stand before those
    that the parallel styles register in the first forward pass; importing the Trainer takes seconds.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter.data, DTensor):
            with torch.no_grad():
                dist.broadcast(parameter.data, src=0)
            parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]


def _average_gradient(parameter: torch.Tensor) -> None:
    # gloo has no AVG
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad.div_(dist.get_world_size())
