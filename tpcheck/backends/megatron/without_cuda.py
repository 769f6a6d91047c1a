"""Lets models of Megatron be built and run on any machine: without CUDA, Apex, and compiled functions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


@contextmanager
def runs_anywhere() -> Iterator[None]:
    """Replace what Megatron needs CUDA for, where the ranks have no GPU each.

    Dropout is off, so Megatron's random generators, which the program would have to seed, are replaced by ones that do
    nothing. Functions that Megatron compiles run uncompiled, in the dtype of the run.
    """
    with ExitStack() as stack:
        stack.enter_context(
            patch.multiple(random, _CUDA_RNG_STATE_TRACKER=None, _CUDA_RNG_STATE_TRACKER_INITIALIZED=False)
        )
        random.initialize_rng_tracker(inference_rng_tracker=True)  # the tracker whose fork() does nothing
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not (torch.cuda.is_available() and dist.get_backend() == dist.Backend.NCCL):  # gloo: more ranks than GPUs
            stack.enter_context(patch.object(torch.cuda, "current_device", lambda: _CPU))
            make_norm = _torch_norm_for_sequence_parallel(WrappedTorchNorm.__new__)
            stack.enter_context(patch.object(WrappedTorchNorm, "__new__", make_norm))
            stack.enter_context(_CudaIsCpu())
        yield


def _torch_norm_for_sequence_parallel(make: Any) -> Any:
    """Let torch's norms replace Apex's under sequence parallelism, with the same mark on their parameters.

    The norms of Apex and Transformer Engine need CUDA.
    """

    def norm(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        without_sequence_parallel = copy.copy(config)
        without_sequence_parallel.sequence_parallel = False
        module = make(cls, without_sequence_parallel, *args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return module

    return norm


class _CudaIsCpu(TorchFunctionMode):
    """Make tensors on the CPU that are asked for on a CUDA device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.device:  # names a device without making a tensor: torch.random.fork_rng lists devices
            return func(*args, **(kwargs or {}))
        return func(*(_on_cpu(arg) for arg in args), **{name: _on_cpu(value) for name, value in (kwargs or {}).items()})


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return _CPU if is_cuda else value
