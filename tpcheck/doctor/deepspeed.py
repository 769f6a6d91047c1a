"""Problems of a DeepSpeed configuration, and the files that each way of saving writes under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from tpcheck.core.deepspeed_config import ignored_keys
from tpcheck.core.guides import Guide
from tpcheck.core.optimizers import needs_whole_matrices

PRESETS = frozenset("llama bloom chatglm mixtral deepseek_v2 qwen2 phi3".split())
Config = Mapping[str, Any]
Severity = Literal["broken", "trap", "advice"]


@dataclass(frozen=True, slots=True)
class Advice:
    """A problem that a rule found.

    Attributes:
        rule: Name of the rule.
        what: The problem and its consequence.
        fix: What to do: a line to add, a command; None for a problem without a fix.
        link: Where to read more.
        severity: `broken`: something does not do what it says, whatever the program does. `trap`: a usual step goes
            wrong. `advice`: nothing goes wrong.
    """

    rule: str
    what: str
    fix: str | None = None
    link: str | None = None
    severity: Severity = "broken"


@dataclass(frozen=True, slots=True)
class Saved:
    """The files that one way of saving writes.

    Attributes:
        way: The call.
        writes: What it writes.
        is_model: Whether that is the whole model.
    """

    way: str
    writes: str
    is_model: bool


def what_is_saved(config: Config) -> Iterator[Saved]:
    """Yield the files of each public way of saving of DeepSpeed 0.17 to 0.19, according to its engine.py."""
    tp, stage = num_tp(config), zero_stage(config)
    yield _save_16bit_model(config, tp, stage)
    if tp > 1 or stage == 3:
        buffers = "" if stage == 3 else ", without persistent buffers"
        needs = "" if _gathers_when_saving(config) else f" (it needs {_GATHERS})"
        whole = f"on rank 0, every parameter whole{buffers}{needs}"
        yield Saved("accelerator.get_state_dict(engine)", whole, stage == 3)
    if tp > 1 and stage < 3:
        yield Saved("GatherReplacedLayerParams", "of each module, on all ranks: every parameter whole", True)
    files = "mp_rank_00" if tp == 1 else f"mp_rank_00 to mp_rank_{tp - 1:02}, one TP shard each"
    masters = "; fp32 weights in the optimizer's files, one for each DP rank" if stage else ""
    yield Saved("engine.save_checkpoint", f"a training checkpoint: {files}{masters}", True)
    if stage:
        yield Saved("ds_to_universal on that", "fp32 weights, whole: loads with any number of TP ranks", True)


def _save_16bit_model(config: Config, tp: int, stage: int) -> Saved:
    way = "engine.save_16bit_model"
    if stage == 3:
        if not _gathers_when_saving(config):
            return Saved(way, f"nothing: {_GATHERS} is not true", False)
        return Saved(way, "the whole model, in its 16-bit dtype where it has one", True)
    if tp > 1:
        return Saved(way, f"TP rank 0's shards, as if they were the model: about 1/{tp} of it", False)
    return Saved(way, "the whole model, as large as without TP: tensor parallelism is off", True)


_GATHERS = "stage3_gather_16bit_weights_on_model_save"


def _gathers_when_saving(config: Config) -> bool:
    return section(config, "zero_optimization").get(_GATHERS) is True


def num_tp(config: Config) -> int:
    """Return the TP size of the configuration; 1 if it sets none."""
    size = section(config, "tensor_parallel").get("autotp_size")
    return size if isinstance(size, int) and size > 1 else 1


def zero_stage(config: Config) -> int:
    """Return the ZeRO stage; 0 if the configuration sets none."""
    stage = section(config, "zero_optimization").get("stage", 0)
    return stage if isinstance(stage, int) else 0


def section(config: Config, name: str) -> Mapping[str, Any]:
    """Return a section of the configuration; empty if it is missing or no mapping."""
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


Problems = Iterator[tuple[str, str | None]]
"""What the problem is, and what to do about it."""


def clipping_is_on_unless_set(config: Config) -> Problems:
    """Without `gradient_clipping` DeepSpeed clips."""
    if "gradient_clipping" not in config:
        yield (
            "gradient_clipping is not set: DeepSpeed clips gradients to a norm of 1.0",
            'add "gradient_clipping": 0.0 to disable clipping, or set the intended norm',
        )


def tensor_parallelism_is_off(config: Config) -> Problems:
    """Without a TP size above 1 nothing is sharded, whatever else the section sets."""
    if num_tp(config) == 1:
        size = section(config, "tensor_parallel").get("autotp_size")
        state = "is not set" if size is None else f"is {size}"
        yield (
            f"tensor_parallel.autotp_size {state}: no parameter will be sharded, and checkpoints are as large as "
            "without TP, unless deepspeed.tp_model_init shards the model",
            'add "tensor_parallel": {"autotp_size": 2}',
        )


def saved_model_is_one_shard(config: Config) -> Problems:
    """`save_16bit_model` writes the shards of TP rank 0."""
    size, stage = num_tp(config), zero_stage(config)
    if size > 1 and stage < 3:
        yield (
            f"with autotp_size {size} and ZeRO {stage}, engine.save_16bit_model silently writes TP rank 0's "
            "shards as if they were the model",
            "gather each module's parameters by deepspeed.module_inject.layers.GatherReplacedLayerParams on all ranks, "
            "and save what rank 0 has",
        )


def only_the_last_backward_pass_counts(config: Config) -> Problems:
    """ZeRO 1 and 2 start to accumulate anew at each backward pass at which they expect to step.

    Measured with deepspeed 0.19.8, two backward passes and one step: ZeRO 1 and 2 apply the gradients of the last pass
    alone (to 4e-8), ZeRO 0 and 3 the sum of both.
    """
    stage, passes = zero_stage(config), config.get("gradient_accumulation_steps", 1)
    if stage in (1, 2) and passes == 1:
        yield (
            "with gradient_accumulation_steps 1, a loop with several backward passes before each engine.step() trains "
            f"on the last one alone at ZeRO {stage} (on their sum at ZeRO 0 and 3)",
            "set gradient_accumulation_steps to the number of backward passes, and call engine.step() after each",
        )


def optimizer_sees_one_shard(config: Config) -> Problems:
    """AutoTP hands the optimizer each rank's shards: one whose step depends on the whole matrix computes another."""
    name, size = section(config, "optimizer").get("type"), num_tp(config)
    if isinstance(name, str) and size > 1 and needs_whole_matrices(name):
        yield (
            f"optimizer {name} computes its step from a whole matrix, and with autotp_size {size} DeepSpeed gives it "
            "each rank's shard: it trains otherwise than without TP, silently",
            "use an optimizer that steps each element by itself, such as AdamW",
        )


def unknown_keys_are_ignored(config: Config) -> Problems:
    """A key that DeepSpeed does not read at the top of the configuration has no effect."""
    for key, near in ignored_keys(config).items():
        what = f"{key} is no key of DeepSpeed's configuration: DeepSpeed ignores it silently"
        yield what, f"did you mean {near}?" if near else None


def preset_is_unknown(config: Config) -> Problems:
    """DeepSpeed ignores an unknown preset silently."""
    preset = section(config, "tensor_parallel").get("preset_model")
    if isinstance(preset, str) and preset.lower() not in PRESETS:
        near = get_close_matches(preset.lower(), PRESETS, n=1, cutoff=0.5)
        yield (
            f"preset_model {preset!r} does not exist: DeepSpeed ignores it silently",
            f"did you mean {near[0]}?" if near else f"one of {', '.join(sorted(PRESETS))}",
        )


def preset_comes_before_the_model_s_plan(config: Config) -> Problems:
    """A preset replaces the model's tp_plan."""
    preset = _known_preset(config)
    if preset not in (None, "bloom"):
        yield (
            f"preset_model {preset!r} replaces the model's tp_plan",
            "remove preset_model if the model has a tp_plan; tpcheck verify shows which of the two is right",
        )


def preset_of_bloom_has_wrong_slopes(config: Config) -> Problems:
    """The preset shards BLOOM's heads, and each rank keeps the ALiBi slopes of the first ones.

    Measured with deepspeed 0.19.8 at tp 2: the logits are off by 7 %.
    """
    if _known_preset(config) == "bloom":
        yield (
            "preset_model 'bloom' shards the heads: each rank then silently has wrong ALiBi slopes",
            "remove preset_model",
        )


def _known_preset(config: Config) -> str | None:
    preset = section(config, "tensor_parallel").get("preset_model")
    return preset.lower() if isinstance(preset, str) and preset.lower() in PRESETS else None


def norm_of_bfloat16_is_local(config: Config) -> Problems:
    """At ZeRO 0 in bfloat16 the norm that clips is that of one TP rank's shards.

    Measured with deepspeed 0.19.8: docs/upstream/deepspeed_bf16_norm.py.
    """
    if _is_bfloat16(config) and num_tp(config) > 1 and zero_stage(config) == 0 and _clips(config):
        yield (
            f"with bf16, autotp_size {num_tp(config)} and ZeRO 0, gradients are clipped by the norm of one TP rank's "
            "shards: too little, and differently at each TP size",
            'set "zero_optimization": {"stage": 1}, or "gradient_clipping": 0.0',
        )


def losses_of_float16_are_not_scaled(config: Config) -> Problems:
    """Without ZeRO, `engine.backward` does not multiply by the loss scale that `engine.step` divides by.

    Measured with deepspeed 0.19.8: docs/upstream/deepspeed_fp16_loss_not_scaled.py.
    """
    if _is_float16(config) and zero_stage(config) == 0 and section(config, "fp16").get("loss_scale") != 1:
        yield (
            "with fp16 and ZeRO 0, gradients are divided by a loss scale that the loss was never multiplied by: they "
            "are too small by that factor",
            'set "zero_optimization": {"stage": 1}, or use bf16',
        )


def growing_scale_shortens_a_step(config: Config) -> Problems:
    """Under ZeRO the step at which the dynamic loss scale grows divides by the new scale; clipping hides it.

    Measured with deepspeed 0.19.8: docs/upstream/deepspeed_fp16_growing_scale.py.
    """
    fp16 = section(config, "fp16")
    if _is_float16(config) and zero_stage(config) > 0 and not _clips(config) and not fp16.get("loss_scale"):
        yield (
            f"with fp16, ZeRO {zero_stage(config)}, a dynamic loss scale and no clipping, the step at which the scale "
            f"grows (each {fp16.get('loss_scale_window', 1000)} steps) divides gradients by the new scale: it is half "
            "as long",
            'set "loss_scale" in "fp16", or use bf16',
        )


def muon_drops_gradients(config: Config) -> Problems:
    """At ZeRO 2 with gradients in float32, slices before those of a matrix of Muon's are dropped.

    Measured with deepspeed 0.19.8: docs/upstream/deepspeed_muon_drops_gradients.py.
    """
    is_muon = str(section(config, "optimizer").get("type")).lower() == "muon"
    if is_muon and zero_stage(config) == 2 and section(config, "data_types").get("grad_accum_dtype") == "fp32":
        yield (
            "Muon at ZeRO 2 with gradients in float32 (grad_accum_dtype) drops gradients of norms and biases: they are "
            "not trained",
            'leave out "grad_accum_dtype", or set "zero_optimization": {"stage": 3}',
        )


def logged_rate_is_that_of_the_next_step(config: Config) -> Problems:
    """The engine steps its scheduler before the Trainer reads the rate.

    Measured with deepspeed 0.19.8: docs/upstream/deepspeed_trainer_logged_rate.py.
    """
    if section(config, "scheduler").get("type"):
        yield (
            "with a scheduler in this configuration, transformers' Trainer logs the learning rate of the next step",
            "leave the scheduler to the Trainer, or read its log one step later",
        )


def overlap_needs_contiguous_gradients(config: Config) -> Problems:
    """The overlapped backward pass of AutoTP's layers takes views.

    Measured with deepspeed 0.19.8: docs/upstream/deepspeed_overlap_strided_gradient.py and
    deepspeed_overlap_empty_shard.py.
    """
    if num_tp(config) > 1 and section(config, "tensor_parallel").get("tp_overlap_comm") is True:
        yield (
            "with tp_overlap_comm, the backward pass fails where a rank has no part of a layer (fewer heads than "
            "ranks), and at gradients that are not contiguous",
            "leave out tp_overlap_comm where one of these is the case",
        )


def zero_3_needs_a_part_on_every_rank(config: Config) -> Problems:
    """ZeRO 3 waits for parameters of no elements.

    Measured with deepspeed 0.19.8: docs/upstream/deepspeed_zero3_empty_shard.py.
    """
    if num_tp(config) > 1 and zero_stage(config) == 3:
        yield (
            f"with autotp_size {num_tp(config)} and ZeRO 3, the forward pass fails where a rank has no part of a layer "
            "(a model with fewer key-value heads than TP ranks)",
            "set another ZeRO stage, or an autotp_size of at most the key-value heads, for such a model",
        )


def _is_bfloat16(config: Config) -> bool:
    return any(section(config, name).get("enabled") is True for name in ("bf16", "bfloat16"))


def _is_float16(config: Config) -> bool:
    return section(config, "fp16").get("enabled") is True


def _clips(config: Config) -> bool:
    return bool(config.get("gradient_clipping", 1.0))


RULES: Mapping[Callable[[Config], Problems], Severity] = {
    unknown_keys_are_ignored: "broken",
    tensor_parallelism_is_off: "trap",
    preset_is_unknown: "broken",
    preset_comes_before_the_model_s_plan: "trap",
    preset_of_bloom_has_wrong_slopes: "broken",
    norm_of_bfloat16_is_local: "broken",
    losses_of_float16_are_not_scaled: "broken",
    growing_scale_shortens_a_step: "broken",
    muon_drops_gradients: "broken",
    clipping_is_on_unless_set: "trap",
    saved_model_is_one_shard: "trap",
    only_the_last_backward_pass_counts: "trap",
    optimizer_sees_one_shard: "broken",
    overlap_needs_contiguous_gradients: "trap",
    zero_3_needs_a_part_on_every_rank: "advice",
    logged_rate_is_that_of_the_next_step: "advice",
}

_GUIDES: Mapping[Callable[[Config], Problems], Guide] = {
    tensor_parallelism_is_off: Guide.WHICH_MODELS,
    norm_of_bfloat16_is_local: Guide.LOSS_DIFFERS,
    losses_of_float16_are_not_scaled: Guide.LOSS_DIFFERS,
    saved_model_is_one_shard: Guide.SAVED_MODEL,
}


def config_advice(config: Config) -> Iterator[Advice]:
    """Yield the advice of every rule on a configuration."""
    for rule, severity in RULES.items():
        link = _GUIDES[rule].url if rule in _GUIDES else None
        for what, fix in rule(config):
            yield Advice(rule.__name__, what, fix, link, severity)
