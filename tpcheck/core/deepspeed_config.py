"""What a DeepSpeed configuration of the user's says of a run, and what of it concerns hardware alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

KNOWN_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    steps_per_print dump_state disable_python_gc disable_allgather communication_data_type
    seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
    zero_optimization activation_checkpointing comms_logger tensorboard wandb csv_monitor comet gradient_clipping
    fp16 bf16 bfloat16 torch_autocast optimizer scheduler zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    flops_profiler wall_clock_breakdown memory_breakdown autotuning use_data_before_expert_parallelism hybrid_engine
    pipeline data_efficiency checkpoint data_types aio dataloader_drop_last log_level datastates_ckpt
    weight_quantization compile timers tensor_parallel expert_parallel sequence_parallel_size data_parallel_group
    vocabulary_size curriculum_learning compression_training amp quantize_training elasticity graph_harvesting
    sparse_attention sparse_gradients nebula eigenvalue progressive_layer_drop""".split()
)
AUTO = "auto"  # what transformers' Trainer fills in from its own arguments

# Where tensors lie, what is measured and printed: the mathematics stays the same. The dtype of communication does not
# belong here: gradients that travel in bfloat16 are rounded.
_HARDWARE = frozenset(
    """aio activation_checkpointing autotuning comet comms_logger csv_monitor datastates_ckpt disable_python_gc
    dump_state elasticity flops_profiler hybrid_engine log_level memory_breakdown nebula steps_per_print tensorboard
    timers wall_clock_breakdown wandb""".split()
)
_HARDWARE_OF_ZERO = frozenset(
    """cpu_offload cpu_offload_params cpu_offload_use_pin_memory offload_optimizer offload_param sub_group_size
    super_offload zenflow""".split()
)
_DATA = frozenset(
    """curriculum_learning data_efficiency dataloader_drop_last train_batch_size
    train_micro_batch_size_per_gpu""".split()
)


def left_out(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a configuration without what a verification does not take from it, and sentences that say so.

    Keys that DeepSpeed ignores stay, and have a sentence too.

    Example:
        >>> kept, notes = left_out({"steps_per_print": 10, "gradient_clipping": 1.0})
        >>> kept, notes[0]
        ({'gradient_clipping': 1.0}, 'left out of the configuration, since it concerns hardware alone: steps_per_print')
    """
    zero = config.get("zero_optimization")
    inner = [key for key in zero if key in _HARDWARE_OF_ZERO] if isinstance(zero, Mapping) else []
    hardware = [key for key in config if key in _HARDWARE]
    data = [key for key in config if key in _DATA]
    kept = {key: value for key, value in config.items() if key not in (*hardware, *data)}
    if inner and isinstance(zero, Mapping):
        kept["zero_optimization"] = {key: value for key, value in zero.items() if key not in inner}
    hardware += [f"zero_optimization.{key}" for key in inner]
    notes = []
    if hardware:
        notes.append(f"left out of the configuration, since it concerns hardware alone: {', '.join(hardware)}")
    if data:
        notes.append(f"left out of the configuration, since batches are those of the verification: {', '.join(data)}")
    ignored = [f"{key} (did you mean {near}?)" if near else key for key, near in ignored_keys(config).items()]
    if ignored:
        notes.append(f"no keys of DeepSpeed's configuration, which it ignores: {', '.join(ignored)}")
    return kept, tuple(notes)


def ignored_keys(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that DeepSpeed does not read at the top of a configuration, with the nearest that it does.

    Example:
        >>> ignored_keys({"gradient_cliping": 0, "bf16": {}, "_why": "tuned"})
        {'gradient_cliping': 'gradient_clipping', '_why': ''}
    """
    unknown = [str(key) for key in config if key not in KNOWN_KEYS]
    return {key: next(iter(get_close_matches(key, KNOWN_KEYS, n=1, cutoff=0.7)), "") for key in unknown}


def implied_options(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the options of a run that a configuration sets, with the key that sets each.

    Example:
        >>> implied_options({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}})
        {'zero': ('zero_optimization.stage', 1), 'dtype': ('bf16.enabled', 'bfloat16')}
    """
    values: dict[str, tuple[str, Any]] = {}
    for option, section, key in (("tp", "tensor_parallel", "autotp_size"), ("zero", "zero_optimization", "stage")):
        inner = config.get(section)
        value = inner.get(key) if isinstance(inner, Mapping) else None
        if _is_number(value) and (option != "tp" or value):  # an autotp_size of 0 is off
            values[option] = f"{section}.{key}", value
    if _is_number(accumulate := config.get("gradient_accumulation_steps")):
        values["accumulate"] = "gradient_accumulation_steps", accumulate
    for section, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        if _is_enabled(config, section):
            values["dtype"] = f"{section}.enabled", dtype
    return values


def without_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that leaves TP size, ZeRO stage and accumulation to the options of the run.

    Example:
        >>> without_sizes({"zero_optimization": {"stage": 1, "overlap_comm": True}, "steps": 3})
        {'zero_optimization': {'overlap_comm': True}, 'steps': 3}
    """
    sizes = {"tensor_parallel": "autotp_size", "zero_optimization": "stage"}
    return {
        name: {key: inner for key, inner in value.items() if key != sizes[name]}
        if name in sizes and isinstance(value, Mapping)
        else value
        for name, value in config.items()
        if name != "gradient_accumulation_steps"
    }


def _is_enabled(config: Mapping[str, Any], section: str) -> bool:
    inner = config.get(section)
    return isinstance(inner, Mapping) and inner.get("enabled") is True


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def resolve_auto(config: Mapping[str, Any], values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return a configuration with the values of its `auto` entries; one without a value is dropped.

    Args:
        values: By dotted key.

    Example:
        >>> resolve_auto({"optimizer": {"params": {"lr": "auto", "eps": "auto"}}}, {"optimizer.params.lr": 5e-05})
        {'optimizer': {'params': {'lr': 5e-05}}}
    """
    resolved = {}
    for key, value in config.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            resolved[key] = resolve_auto(value, values, f"{name}.")
        elif value != AUTO:
            resolved[key] = value
        elif name in values:
            resolved[key] = values[name]
    return resolved
