"""The DeepSpeed configuration of a run: tpcheck's defaults with the user's configuration merged over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tpcheck.backends.interface import TrainingOptions
from tpcheck.core.errors import UsageError

# `round_robin_gradients` is left out: with it, `safe_get_full_grad` of DeepSpeed 0.19.8 fails at dp=2, even without TP.
CONFIG_VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"tensor_parallel": {"tp_overlap_comm": True}},
    {"gradient_clipping": 0.01},
    {"zero_optimization": {"overlap_comm": True}},
    {"zero_optimization": {"reduce_scatter": False}},
    {"zero_optimization": {"contiguous_gradients": False}},
    {"zero_optimization": {"reduce_bucket_size": 500}},
    {"zero_optimization": {"stage3_param_persistence_threshold": 100}},
)

_LOW_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_REFUSED = {  # the reference has neither, so the two sides would differ for that reason
    "optimizer": "none: both sides train with SGD, whose step shows a wrong scale of the gradient",
    "scheduler": "none: both sides keep their learning rate",
}


def resolved(options: TrainingOptions) -> TrainingOptions:
    """Return the options with the gradient clipping of the user's configuration.

    Raises:
        UsageError: The configuration contradicts the options, or sets something that the reference lacks.
    """
    config = options.config
    for key, accepted in _REFUSED.items():
        if key in config:
            raise UsageError(f"config.{key}", config[key], accepted)
    if config.get("gradient_accumulation_steps", 1) != 1:
        raise UsageError("config.gradient_accumulation_steps", config["gradient_accumulation_steps"], "1")
    for dtype, section in _LOW_PRECISION.items():
        enabled = config.get(section, {}).get("enabled", dtype is options.dtype)
        if enabled != (dtype is options.dtype):
            raise UsageError(f"config.{section}.enabled", enabled, f"{not enabled}, as dtype={options.dtype} requires")
    return replace(options, max_grad_norm=float(config.get("gradient_clipping", options.max_grad_norm)))


def deepspeed_config(options: TrainingOptions, tp: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Raises:
        UsageError: The user's configuration contradicts the options of the run.
    """
    defaults: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.max_grad_norm,  # by default DeepSpeed clips to 1.0
        "zero_optimization": {"stage": options.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "tensor_parallel": {"autotp_size": tp},
        "steps_per_print": 1_000_000,
    }
    if options.zero_stage == 3:
        # By default ZeRO-3 does not partition parameters below 100,000 elements: none of a small model's.
        defaults["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if options.dtype in _LOW_PRECISION:
        defaults[_LOW_PRECISION[options.dtype]] = {"enabled": True}
    config = merged(defaults, options.config)
    _require_same(config, ("zero_optimization", "stage"), options.zero_stage)
    _require_same(config, ("tensor_parallel", "autotp_size"), tp)
    return config


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` merged into it, nested mappings key by key."""
    result = dict(base)
    for key, value in over.items():
        are_mappings = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if are_mappings else value
    return result


def _require_same(config: Mapping[str, Any], path: tuple[str, str], expected: int) -> None:
    section, key = path
    value = config[section][key] if isinstance(config[section], Mapping) else config[section]
    if value != expected:
        raise UsageError(f"config.{section}.{key}", value, f"{expected}, to match the options of the run")
