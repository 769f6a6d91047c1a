"""Megatron's configuration objects: the tensor-parallel size of each side, the user's fields, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import ModelParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import nn

from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.limits import require_within_limits
from tpcheck.backends.optimizer import named_optimizer
from tpcheck.core.errors import UsageError

_NEEDS_SEVERAL_RANKS = ("sequence_parallel", "tp_comm_overlap")  # Megatron refuses them at tensor-parallel size 1
_UNVERIFIED = {"recompute_granularity": None}  # the value that leaves every number as it is
_POST_INIT = ModelParallelConfig.__post_init__  # read once, since one `configured` may lie inside another
DISTRIBUTED = "use_distributed_optimizer"
"""The field of Megatron's optimizer and DistributedDataParallel that is an option here, too."""
_OF_ADAM = {"lr", "betas", "eps", "weight_decay"}
_OTHER_AXES = ("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")


def require_supported(options: TrainingOptions) -> None:
    """Check the options before a model is built.

    Raises:
        UsageError: Megatron has no such option, its configuration has no such field, or a field is not verified.
    """
    require_within_limits("megatron", options)
    if options.config.get(DISTRIBUTED):
        _require_adamw(options)
    if options.config.get("calculate_per_token_loss") and options.loss != "token_mean":
        raise UsageError("loss", options.loss, "token_mean with calculate_per_token_loss, which divides by all labels")
    _require_verified(options.config)


def _require_verified(config: Mapping[str, Any]) -> None:
    """Check the fields of the user's configuration.

    Raises:
        UsageError: Megatron has no such field, or the value is not verified.
    """
    known = [field.name for field in fields(TransformerConfig) if field.init]
    for name, value in config.items():
        if name == DISTRIBUTED:
            if not isinstance(value, bool):
                raise UsageError(f"config.{name}", value, "true or false")
        elif name not in known:
            raise UsageError("config", name, "a field of Megatron's TransformerConfig, such as sequence_parallel")
        if name == "tensor_model_parallel_size":
            raise UsageError(f"config.{name}", value, "none: the topology sets it")
        if name in _UNVERIFIED and value != _UNVERIFIED[name]:
            raise UsageError(f"config.{name}", value, f"{_UNVERIFIED[name]}: it is not verified, and always off")
        if name in _OTHER_AXES and value != 1:
            raise UsageError(f"config.{name}", value, "1: only tp and dp are verified")


def _require_adamw(options: TrainingOptions) -> None:
    """Check the optimizer that Megatron is to shard over DP.

    Raises:
        UsageError: It is another than AdamW, or has options that Megatron's configuration lacks.
    """
    named = named_optimizer(options)
    if named is None or named[0].lower() != "adamw" or not named[1].keys() <= _OF_ADAM:
        why = f"Megatron's distributed optimizer steps Adam alone, of which it knows {', '.join(sorted(_OF_ADAM))}"
        raise UsageError("optimizer", options.optimizer, f"adamw with {DISTRIBUTED}: {why}")
    if options.dtype is torch.float16:
        raise UsageError("dtype", "float16", f"another dtype with {DISTRIBUTED}: its loss scale is not verified")


@contextmanager
def configured(tp: int, config: Mapping[str, Any], *, draws_whole: bool = True) -> Iterator[None]:
    """Set the tensor-parallel size and the user's fields in every configuration that is created inside.

    Torch's generator initialises the weights on the CPU, so that two builds are equal.

    Args:
        draws_whole: Whether each rank draws the whole weights and keeps its part; otherwise it draws its part.
    """
    settings = {**_settings(tp, config), "use_cpu_initialization": draws_whole}

    def set_and_check(self: Any) -> None:
        for name, value in settings.items():
            if hasattr(self, name):
                setattr(self, name, value)
        _POST_INIT(self)

    with patch.object(ModelParallelConfig, "__post_init__", set_and_check):
        yield


def require_configured(model: nn.Module, tp: int, config: Mapping[str, Any]) -> None:
    """Check that the model was built with the user's fields.

    Raises:
        UsageError: The model's configuration was created before `build` was called.
    """
    actual = megatron_config(model)
    for name, value in _settings(tp, config).items():
        if name in config and getattr(actual, name, value) != value:
            raise UsageError(
                f"config.{name}", value, f"{getattr(actual, name)}, as in the model: create its configuration in build"
            )


def transformer_config(model: nn.Module, tp: int) -> TransformerConfig:
    """Return the model's configuration as a `TransformerConfig`, which `finalize_model_grads` reads."""
    config = megatron_config(model)
    if isinstance(config, TransformerConfig):
        return config
    values = {field.name: getattr(config, field.name) for field in fields(ModelParallelConfig) if field.init}
    return TransformerConfig(num_layers=1, hidden_size=tp, num_attention_heads=tp, **values)


def megatron_config(model: nn.Module) -> Any:
    """Return the configuration of the outermost module that has one.

    Raises:
        UsageError: No module has a configuration of Megatron.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, ModelParallelConfig):
            return config
    raise UsageError(
        "build",
        type(model).__name__,
        "a model made of layers of megatron.core; families are models of transformers, so give a build function: "
        "tpcheck.verify(build, backend='megatron')",
    )


def _settings(tp: int, config: Mapping[str, Any]) -> dict[str, Any]:
    required = {"tensor_model_parallel_size": tp, "use_cpu_initialization": True, **_UNVERIFIED}
    return {**config, **required, **(dict.fromkeys(_NEEDS_SEVERAL_RANKS, False) if tp == 1 else {})}
