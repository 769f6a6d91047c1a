"""What in a DeepSpeed configuration will not do what it seems to. One function for each rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from tpcheck.doctor.advice import Advice
from tpcheck.doctor.deepspeed_keys import KNOWN_KEYS, PRESETS
from tpcheck.doctor.saving import num_tp, section, zero_stage

Config = Mapping[str, Any]


def clipping_is_on_unless_set(config: Config) -> Iterator[Advice]:
    """`gradient_clipping` has a default that clips."""
    if "gradient_clipping" not in config:
        yield Advice(
            rule="clipping_is_on_unless_set",
            what="gradient_clipping is not set: DeepSpeed clips gradients to a norm of 1.0",
            fix='add "gradient_clipping": 0.0 to clip nothing, or the norm that is meant',
        )


def tensor_parallelism_is_off(config: Config) -> Iterator[Advice]:
    """Without a TP size above 1 nothing is sharded, whatever else stands in the section."""
    size = section(config, "tensor_parallel").get("autotp_size")
    if num_tp(config) > 1:
        return
    found = "is not set" if size is None else f"is {size}"
    yield Advice(
        rule="tensor_parallelism_is_off",
        what=f"tensor_parallel.autotp_size {found}: no parameter will be sharded, and what is saved is as "
        "large as without TP, unless deepspeed.tp_model_init shards it",
        fix='add "tensor_parallel": {"autotp_size": 2}',
    )


def saved_model_is_one_shard(config: Config) -> Iterator[Advice]:
    """`save_16bit_model` writes what TP rank 0 holds."""
    size, stage = num_tp(config), zero_stage(config)
    if size > 1 and stage < 3:
        yield Advice(
            rule="saved_model_is_one_shard",
            what=f"with autotp_size {size} and ZeRO {stage}, engine.save_16bit_model silently writes TP rank 0's "
            "shards as if they were the model",
            fix="on all ranks call engine._consolidated_16bit_state_dict(), and save what rank 0 gets; add buffers",
        )


def unknown_keys_are_ignored(config: Config) -> Iterator[Advice]:
    """A key that DeepSpeed does not read at the top of the configuration has no effect."""
    for key in config:
        if key not in KNOWN_KEYS:
            near = get_close_matches(key, KNOWN_KEYS, n=1, cutoff=0.7)
            yield Advice(
                rule="unknown_keys_are_ignored",
                what=f"{key} is no key of DeepSpeed's configuration: it is ignored silently",
                fix=f"did you mean {near[0]}?" if near else None,
            )


def preset_is_unknown(config: Config) -> Iterator[Advice]:
    """An unknown preset is passed over without a word."""
    preset = section(config, "tensor_parallel").get("preset_model")
    if isinstance(preset, str) and preset.lower() not in PRESETS:
        near = get_close_matches(preset.lower(), PRESETS, n=1, cutoff=0.5)
        yield Advice(
            rule="preset_is_unknown",
            what=f"preset_model {preset!r} does not exist: it is ignored silently",
            fix=f"did you mean {near[0]}?" if near else f"one of {', '.join(sorted(PRESETS))}",
        )


def preset_comes_before_the_model_s_plan(config: Config) -> Iterator[Advice]:
    """A preset takes the place of the model's own tp_plan."""
    preset = section(config, "tensor_parallel").get("preset_model")
    if isinstance(preset, str) and preset.lower() in PRESETS:
        # Measured with deepspeed 0.19.8 at tp 2: the logits are off by 7 %.
        wrong = "; with bloom each rank then has wrong ALiBi slopes, silently" if preset.lower() == "bloom" else ""
        yield Advice(
            rule="preset_comes_before_the_model_s_plan",
            what=f"preset_model {preset!r} takes the place of the model's own tp_plan{wrong}",
            fix="remove preset_model where the model has a tp_plan; tpcheck verify tells which of them is right",
        )


RULES = (
    unknown_keys_are_ignored,
    tensor_parallelism_is_off,
    preset_is_unknown,
    preset_comes_before_the_model_s_plan,
    clipping_is_on_unless_set,
    saved_model_is_one_shard,
)


def config_advice(config: Config) -> Iterator[Advice]:
    """Yield what every rule has to say of a configuration."""
    for rule in RULES:
        yield from rule(config)
