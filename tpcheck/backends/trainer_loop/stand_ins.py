"""What stands in where transformers and accelerate ask for GPUs, and the global state of both, put back at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from transformers import training_args
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils import logging

from tpcheck.core.generators import generators_kept


@contextmanager
def trainer_session() -> Iterator[None]:
    """Let the Trainer train in the world that is there, on CPUs as on GPUs; leave no trace of it in the process.

    Under a launcher accelerate asks for a world of processes with one GPU each. On a CPU it makes one of a single
    process for DeepSpeed, and refuses tensor parallelism otherwise. Three answers are replaced:

    - which backend and which kind of world the process belongs to: what accelerate answers to `use_cpu=True`, gloo;
    - whether the world is one of several devices, which a `ParallelismConfig` must have: a gloo world is;
    - whether the device computes in bfloat16: a CPU does.

    gloo has no mean: where the Trainer asks for one, the sum is divided.
    """
    with ExitStack() as stack:
        stack.enter_context(_global_state_restored())
        if not dist.is_initialized() or dist.get_backend() != "nccl":
            stack.enter_context(patch.object(PartialState, "_prepare_backend", _backend_of_the_cpu))
            stack.enter_context(patch.object(accelerate.Accelerator, "multi_device", property(_is_world_of_several)))
            stack.enter_context(patch.object(training_args, "is_torch_bf16_gpu_available", lambda: True))
            stack.enter_context(patch.object(dist, "all_reduce", _all_reduce_with_mean))
        yield


_prepare_backend = PartialState._prepare_backend
_all_reduce = dist.all_reduce


def _backend_of_the_cpu(state: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
    return _prepare_backend(state, True, *args, **kwargs)


def _is_world_of_several(accelerator: Any) -> bool:
    return bool(accelerator.use_distributed) and accelerator.distributed_type is DistributedType.MULTI_CPU


def _all_reduce_with_mean(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **kwargs: Any) -> Any:
    if op != dist.ReduceOp.AVG:
        return _all_reduce(tensor, op, group, **kwargs)
    _all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor.div_(dist.get_world_size(group))


@contextmanager
def _global_state_restored() -> Iterator[None]:
    """Put back what Trainer and accelerate keep in globals: environment, singletons, generators, verbosity."""
    singletons: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
    kept = [dict(singleton._shared_state) for singleton in singletons]
    verbosity, config = logging.get_verbosity(), deepspeed_integration._hf_deepspeed_config_weak_ref
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    world = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": os.environ.get("LOCAL_RANK", str(rank))}
    try:
        with patch.dict(os.environ, world), generators_kept():
            yield
    finally:
        for singleton, state in zip(singletons, kept, strict=True):
            singleton._shared_state.clear()
            singleton._shared_state.update(state)
        logging.set_verbosity(verbosity)
        deepspeed_integration._hf_deepspeed_config_weak_ref = config
