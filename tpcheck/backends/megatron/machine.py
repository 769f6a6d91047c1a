"""What Megatron expects of the machine it runs on: CUDA and its generators, and norms of Apex."""

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
def stand_ins() -> Iterator[None]:
    """Let models of Megatron be built and run, without CUDA where the ranks have none.

    Dropout is off, so that nothing is drawn: generators of its own, which the program would have to seed, stay as they
    are. Functions that Megatron compiles run as they are written, in the dtype of the run.
    """
    with ExitStack() as stack:
        stack.enter_context(
            patch.multiple(random, _CUDA_RNG_STATE_TRACKER=None, _CUDA_RNG_STATE_TRACKER_INITIALIZED=False)
        )
        random.initialize_rng_tracker(inference_rng_tracker=True)  # the one whose fork() does nothing
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not (torch.cuda.is_available() and dist.get_backend() == dist.Backend.NCCL):  # more ranks than GPUs: gloo
            stack.enter_context(_without_cuda())
        yield


@contextmanager
def _without_cuda() -> Iterator[None]:
    with (
        patch.object(torch.cuda, "current_device", lambda: _CPU),
        patch.object(WrappedTorchNorm, "__new__", _norm_for_any_parallelism(WrappedTorchNorm.__new__)),
        _CudaIsCpu(),
    ):
        yield


def _norm_for_any_parallelism(make: Any) -> Any:
    """Let torch's norms stand in for Apex's under sequence parallelism, marked as Apex's are.

    Apex and Transformer Engine, whose norms do this, need CUDA.
    """

    def norm(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        made = make(cls, plain, *args, **kwargs)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return made

    return norm


class _CudaIsCpu(TorchFunctionMode):
    """Tensors that are asked for on a CUDA device are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.device:  # named, and nothing made on it: torch.random.fork_rng asks which devices there are
            return func(*args, **(kwargs or {}))
        return func(*(_here(arg) for arg in args), **{name: _here(value) for name, value in (kwargs or {}).items()})


def _here(value: Any) -> Any:
    is_cuda = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return _CPU if is_cuda else value
