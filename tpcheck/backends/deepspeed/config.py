"""The DeepSpeed configuration of a run: tpcheck's defaults with the user's configuration merged over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import lr_schedules

from tpcheck.backends.deepspeed.muon import make_muon
from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.loss_scale import LossScale
from tpcheck.backends.optimizer import OptimizerByNames, named_optimizer, optimizer_class
from tpcheck.core.deepspeed_config import AUTO, left_out, resolve_auto
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


def resolved(options: TrainingOptions) -> TrainingOptions:
    """Return the options with clipping, accumulation, optimizer and schedule of the user's configuration.

    Raises:
        UsageError: The configuration contradicts the options.
    """
    unresolved, notes = left_out(options.config)
    config = resolve_auto(unresolved, _trainer_values(options))
    for dtype, section in _LOW_PRECISION.items():
        enabled = config.get(section, {}).get("enabled", dtype is options.dtype)
        if enabled != (dtype is options.dtype):
            raise UsageError(f"config.{section}.enabled", enabled, f"{not enabled}, as dtype={options.dtype} requires")
    accumulate = config.get("gradient_accumulation_steps", options.accumulate)
    if not isinstance(accumulate, int) or accumulate < 1:
        raise UsageError("config.gradient_accumulation_steps", accumulate, "a positive integer")
    if options.accumulate not in (1, accumulate):
        raise UsageError("config.gradient_accumulation_steps", accumulate, f"{options.accumulate}, as accumulate")
    trained = replace(
        options,
        config=config if options.loop == "plain" else unresolved,  # whose values "auto" the Trainer fills in
        notes=(*options.notes, *notes),
        accumulate=accumulate,
        optimizer=_optimizer(options, config),
        schedule=_schedule(config),
        loss_scale=_loss_scale(options, config),
        max_grad_norm=float(config.get("gradient_clipping", options.max_grad_norm)),
    )
    if options.loop != "trainer":
        return trained
    schedule = options.config.get("scheduler", {})
    if AUTO in schedule.get("params", {}).values():
        raise UsageError("config.scheduler.params", schedule["params"], 'numbers: the reference has no values "auto"')
    _require_optimizer_of_trainer(trained)
    from tpcheck.backends.trainer_loop.options import resolved_for_trainer  # imports the Trainer, for seconds

    by_trainer = resolved_for_trainer(trained)
    # What the configuration makes is the engine's, which decays all weights alike.
    return replace(
        by_trainer,
        schedule=trained.schedule or by_trainer.schedule,
        decayed_parameters=None if "optimizer" in config else by_trainer.decayed_parameters,
    )


def _require_optimizer_of_trainer(options: TrainingOptions) -> None:
    """Refuse an optimizer that the Trainer can only be given as `optimizers`.

    With DeepSpeed it drops that one, and trains by its own AdamW (`trainer.optimizer = None` in deepspeed_init of
    transformers/integrations/deepspeed.py of 5.23.0; docs/upstream/deepspeed_trainer_drops_optimizers.py shows it).

    Raises:
        UsageError: It is a callable, or Muon.
    """
    if named_optimizer(options) is None:
        why = "with DeepSpeed the Trainer drops what it is given as `optimizers`, and trains by AdamW"
        accepted = f"another optimizer of torch.optim by name, or loop='plain': {why}"
        raise UsageError("optimizer", options.optimizer, accepted)


def _loss_scale(options: TrainingOptions, config: Mapping[str, Any]) -> Callable[[], LossScale] | None:
    """Return what makes the scale of losses in float16; None in other dtypes.

    Without ZeRO a dynamic scale is halved at once, with ZeRO as `hysteresis` says (runtime/fp16 of 0.19.8).
    """
    if options.dtype is not torch.float16:
        return None
    section = {**_SCALE, **config.get("fp16", {})}
    if scale := float(section["loss_scale"]):
        return partial(LossScale, scale)
    return partial(
        LossScale,
        2.0 ** section["initial_scale_power"],
        window=section["loss_scale_window"],
        least=float(section["min_loss_scale"]),
        hysteresis=section["hysteresis"] if options.zero_stage else 1,
        refills=bool(section["consecutive_hysteresis"] and options.zero_stage),
    )


_SCALE: Mapping[str, Any] = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}
"""DeepSpeed's defaults (runtime/precision_config.py of 0.19.8)."""


def _trainer_values(options: TrainingOptions) -> dict[str, Any]:
    """Return what transformers' Trainer puts in the place of `auto`, by key: its arguments' defaults, or this run's.

    Source: HfTrainerDeepSpeedConfig, src/transformers/integrations/deepspeed.py of 5.23.0. What follows from the
    model's hidden size stays as it is until there is a model.
    """
    return {
        "gradient_accumulation_steps": options.accumulate,
        "gradient_clipping": options.max_grad_norm,  # 1.0, as the Trainer's
        "bf16.enabled": options.dtype is torch.bfloat16,
        "fp16.enabled": options.dtype is torch.float16,
        "optimizer.params.lr": _TRAINER_RATE,
        "optimizer.params.betas": [0.9, 0.999],
        "optimizer.params.eps": 1e-8,
        "optimizer.params.weight_decay": 0.0,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": _TRAINER_RATE,
        "scheduler.params.warmup_num_steps": 1,
        "scheduler.params.total_num_steps": options.steps,
        **{f"zero_optimization.{key}": AUTO for key in _OF_HIDDEN_SIZE},
    }


_TRAINER_RATE = 5e-5
_OF_HIDDEN_SIZE: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def _optimizer(options: TrainingOptions, config: Mapping[str, Any]) -> Any:
    """Return the optimizer that the configuration names, in torch's terms, or that of the options.

    DeepSpeed's `Adam` is AdamW unless `adam_w_mode` is false; its fused Adams decay no weights by default, and torch's
    AdamW does (engine.py:_configure_basic_optimizer of 0.19.8).

    Raises:
        UsageError: It is one that torch does not have, so that the reference cannot step as it does.
    """
    section = config.get("optimizer")
    if section is None:
        return options.optimizer
    name, params = str(section.get("type", "")), dict(section.get("params", {}))
    if name.lower() in _ADAMS:
        decays = name.lower() == "adamw" or params.pop("adam_w_mode", True)
        params = {key: value for key, value in params.items() if key not in _ADAM_FLAGS}
        name = "AdamW" if decays else "Adam"
        params = {**_ADAM_DEFAULTS, **params}
    elif name.lower() == "muon":
        _require_plain_muon(options, float(config.get("gradient_clipping", options.max_grad_norm)))
        if str(options.optimizer).lower() not in ("sgd", "muon"):
            raise UsageError("optimizer", options.optimizer, "none beside config.optimizer, which is Muon")
        return OptimizerByNames(partial(make_muon, params))
    optimizer_class(name)
    if str(options.optimizer).lower() not in ("sgd", name.lower()):  # sgd is the default
        raise UsageError("optimizer", options.optimizer, f"none beside config.optimizer, which is {name}")
    return {"type": name, "params": params}


def _require_plain_muon(options: TrainingOptions, max_grad_norm: float) -> None:
    """Refuse DeepSpeed's Muon where its mathematics is not that of gradients that are clipped, then orthogonalised.

    Raises:
        UsageError: ZeRO 1 and 2 keep what is orthogonalised in the place of gradients, and all stages clip that (step
            in zero/stage_1_and_2.py and stage3.py of 0.19.8); or the Trainer groups parameters.
    """
    if options.zero_stage in (1, 2):
        why = "ZeRO 1 and 2 have Muon's updates in the place of gradients"
        raise UsageError("zero_stage", options.zero_stage, f"0 or 3 with DeepSpeed's Muon: {why}")
    if options.zero_stage and max_grad_norm:
        why = "under ZeRO, DeepSpeed clips what Muon has made of the shards, and no reference has that norm"
        raise UsageError("config.gradient_clipping", max_grad_norm, f"0 with DeepSpeed's Muon at ZeRO 3: {why}")
    if options.loop == "trainer":
        raise UsageError("loop", options.loop, "plain with DeepSpeed's Muon")


_ADAMS = ("adam", "adamw")
_ADAM_FLAGS = ("adam_w_mode", "torch_adam", "fp32_optimizer_states", "foreach")
_ADAM_DEFAULTS = {"lr": 1e-3, "weight_decay": 0.0}


def _schedule(config: Mapping[str, Any]) -> Callable[[torch.optim.Optimizer], Any] | None:
    """Return what makes the scheduler that the configuration names: one of DeepSpeed's own, or of torch.

    Raises:
        UsageError: There is none of that name.
    """
    section = config.get("scheduler")
    if section is None or section.get("type") is None:
        return None
    name = section["type"]
    make = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if make is None:
        raise UsageError("config.scheduler.type", name, lr_schedules.VALID_LR_SCHEDULES)
    return partial(make, **section.get("params", {}))


def deepspeed_config(options: TrainingOptions, tp: int, hidden_size: int | None = None) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Args:
        options: Of `resolved`.
        tp: The TP size.
        hidden_size: The model's, for what the Trainer derives from it.

    Raises:
        UsageError: The user's configuration contradicts the options of the run.
    """
    defaults: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
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
    sizes = (
        {}
        if hidden_size is None
        else {f"zero_optimization.{key}": size(hidden_size) for key, size in _OF_HIDDEN_SIZE.items()}
    )
    config = merged(defaults, resolve_auto(options.config, sizes))
    if "optimizer" in config and config["optimizer"]["type"].lower() in (*_ADAMS, "muon"):
        config["optimizer"] = _with_torch_adam(config["optimizer"], options)
    _require_same(config, ("zero_optimization", "stage"), options.zero_stage)
    _require_same(config, ("tensor_parallel", "autotp_size"), tp)
    return config


def _with_torch_adam(section: Mapping[str, Any], options: TrainingOptions) -> dict[str, Any]:
    """Let torch's Adam stand in for DeepSpeed's fused one, which is built for GPUs and computes in float32."""
    if get_accelerator().device_name() == "cuda" and options.dtype is not torch.float64:
        return dict(section)
    defaults = _ADAM_DEFAULTS if section["type"].lower() in _ADAMS else {}
    params = {**defaults, **section.get("params", {}), "torch_adam": True, "foreach": False}
    return {**section, "params": params}


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
