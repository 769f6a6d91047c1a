"""What Megatron finds while models are built and trained: process groups of its own, and no need of CUDA."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import module_from_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.overrides import TorchFunctionMode

from tpcheck.core.topology import Topology

Groups = Mapping[str, Any]  # the globals of parallel_state


def groups_of_topology(topology: Topology) -> Groups:
    """Initialise a copy of the module for a topology and return its globals. Collective over the world."""
    spec = parallel_state.__spec__
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.initialize_model_parallel(tensor_model_parallel_size=topology.tp, create_gloo_process_groups=False)
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def groups_of_one_rank() -> Groups:
    """Make groups that hold this rank alone, whichever group a model asks for. Collective over the world."""
    state = groups_of_topology(Topology())
    single = state["_TENSOR_MODEL_PARALLEL_GROUP"]
    return {name: _replaced(value, single) for name, value in state.items()}


def _replaced(value: Any, single: dist.ProcessGroup) -> Any:
    """Return the group of one rank in place of a group, and its ranks in place of a list of ranks."""
    if isinstance(value, dist.ProcessGroup):
        return single
    if isinstance(value, list) and all(isinstance(rank, int) for rank in value):
        return dist.get_process_group_ranks(single)
    return value


@contextmanager
def use_groups(groups: Groups) -> Iterator[None]:
    """Make Megatron use these groups inside."""
    with patch.multiple(parallel_state, **groups):
        yield


@contextmanager
def destroy_new_groups() -> Iterator[None]:
    """Destroy the process groups created inside on leaving: a program may verify many models.

    Those of `Rank.group` are created when they are first asked for, and stay: they are the program's. Torch names a
    group that its members alone create by their ranks and by how many groups there are. One that is created again, once
    all others are destroyed, has the name of the one before, and finds in the store the addresses where that listened
    (distributed_c10d.py:_hash_ranks_to_str).
    """
    created: list[Any] = []
    new_group = dist.new_group

    def recording_new_group(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        if not kwargs.get("use_local_synchronization"):  # which nothing in Megatron asks for
            created.append(group)
        return group

    with patch.object(dist, "new_group", recording_new_group):
        yield
    for group in created:
        if isinstance(group, dist.ProcessGroup):  # else this rank is no member
            dist.destroy_process_group(group)


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
        if not has_a_gpu_each():
            stack.enter_context(patch.object(torch.cuda, "current_device", lambda: _CPU))
            stack.enter_context(patch.object(torch.cuda, "synchronize", lambda device=None: None))
            make_norm = _torch_norm_for_sequence_parallel(WrappedTorchNorm.__new__)
            stack.enter_context(patch.object(WrappedTorchNorm, "__new__", make_norm))
            stack.enter_context(_CudaIsCpu())
        stack.enter_context(_TypesOfMegatron())
        yield


@contextmanager
def model_parallel_generators(seed: int, groups: Groups) -> Iterator[None]:
    """Seed Megatron's generators as a training script does, with those of the CPU where ranks have no GPU each.

    Its initialisation draws each rank's shards from a generator of that rank, and all else from a common one.
    """
    tp_rank = dist.get_rank(groups["_TENSOR_MODEL_PARALLEL_GROUP"])
    with ExitStack() as stack:
        stack.enter_context(
            patch.multiple(random, _CUDA_RNG_STATE_TRACKER=None, _CUDA_RNG_STATE_TRACKER_INITIALIZED=False)
        )
        if not has_a_gpu_each():
            stack.enter_context(patch.object(random, "_get_cuda_rng_state", lambda **_: torch.get_rng_state()))
            stack.enter_context(
                patch.object(random, "_set_cuda_rng_state", lambda state, **_: torch.set_rng_state(state))
            )
            stack.enter_context(patch.object(torch.cuda, "get_rng_state", torch.get_rng_state))
            stack.enter_context(patch.object(torch.cuda, "manual_seed", torch.default_generator.manual_seed))
        random.model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
        yield


def has_a_gpu_each() -> bool:
    """Return whether ranks have a GPU each, rather than share one, over gloo.

    A group that takes tensors of the CPU, too, is of the backend "cpu:gloo,cuda:nccl".
    """
    return torch.cuda.is_available() and "nccl" in dist.get_backend_config()


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


class _TypesOfMegatron(TorchFunctionMode):
    """Name the types of tensors as Megatron's optimizers ask for them: of CUDA, and float where they are double."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.type or not isinstance(result, str):
            return result
        return result.replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.").replace("Double", "Float")


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return _CPU if is_cuda else value
