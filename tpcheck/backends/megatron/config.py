"""What Megatron's configuration objects say on each side, and what of them cannot be verified."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import nn
from torch.overrides import TorchFunctionMode

from tpcheck.backends.protocols import TrainingOptions
from tpcheck.core.errors import UsageError

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


_OF_TENSOR_PARALLELISM = ("sequence_parallel", "tp_comm_overlap")  # refused by Megatron where there is one rank
_UNVERIFIED = {"recompute_granularity": None}  # which leaves every number as it is
_CHECK = ModelParallelConfig.__post_init__  # one such context may stand inside another
_OTHER_AXES = ("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")


def require_supported(options: TrainingOptions) -> None:
    """Check what can be checked before a model is built.

    Raises:
        UsageError: An option that Megatron does not have, or a field that no configuration of it has.
    """
    if options.zero_stage:
        raise UsageError("zero_stage", options.zero_stage, "0: Megatron's distributed optimizer is not verified")
    if options.ignore_plan:
        raise UsageError("ignore_plan", True, "False: Megatron has no plans; its layers say how they are cut")
    known = [field.name for field in fields(TransformerConfig) if field.init]
    for name, value in options.config.items():
        if name not in known:
            raise UsageError("config", name, "a field of Megatron's TransformerConfig, such as sequence_parallel")
        if name == "tensor_model_parallel_size":
            raise UsageError(f"config.{name}", value, "none: the topology says it")
        if name in _UNVERIFIED and value != _UNVERIFIED[name]:
            raise UsageError(f"config.{name}", value, f"{_UNVERIFIED[name]}: it is not verified, and always left off")
        if name in _OTHER_AXES and value != 1:
            raise UsageError(f"config.{name}", value, "1: tp and dp are the axes that are verified")


@contextmanager
def configured(tp: int, config: Mapping[str, Any]) -> Iterator[None]:
    """Make every configuration that is created inside one of `tp` ranks, with the user's fields.

    Weights begin as torch's own generator draws them on the CPU, so that two builds begin alike.
    """
    settings = _settings(tp, config)

    def set_and_check(self: Any) -> None:
        for name, value in settings.items():
            if hasattr(self, name):
                setattr(self, name, value)
        _CHECK(self)

    with patch.object(ModelParallelConfig, "__post_init__", set_and_check):
        yield


def require_configured(model: nn.Module, tp: int, config: Mapping[str, Any]) -> None:
    """Check that the model was built with the user's fields.

    Raises:
        UsageError: Its configuration was made before `build` was called.
    """
    made = megatron_config(model)
    for name, value in _settings(tp, config).items():
        if name in config and getattr(made, name, value) != value:
            raise UsageError(
                f"config.{name}", value, f"{getattr(made, name)}, as the model's is: make its configuration in `build`"
            )


def transformer_config(model: nn.Module, tp: int) -> TransformerConfig:
    """Return the model's configuration as the kind that `finalize_model_grads` reads."""
    made = megatron_config(model)
    if isinstance(made, TransformerConfig):
        return made
    values = {field.name: getattr(made, field.name) for field in fields(ModelParallelConfig) if field.init}
    return TransformerConfig(num_layers=1, hidden_size=tp, num_attention_heads=tp, **values)


def megatron_config(model: nn.Module) -> Any:
    """Return the configuration of the outermost module that has one.

    Raises:
        UsageError: No module has any.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, ModelParallelConfig):
            return config
    raise UsageError(
        "build",
        type(model).__name__,
        "a model made of layers of megatron.core, which transformers' families are not: "
        "tpcheck.verify(build, backend='megatron') of a build of your own",
    )


def _settings(tp: int, config: Mapping[str, Any]) -> dict[str, Any]:
    own = {"tensor_model_parallel_size": tp, "use_cpu_initialization": True, **_UNVERIFIED}
    return {**config, **own, **(dict.fromkeys(_OF_TENSOR_PARALLELISM, False) if tp == 1 else {})}
