"""The keys that DeepSpeed 0.19 reads at the top of its configuration; it ignores every other silently.

Collected from deepspeed/runtime/config.py and the constants that it uses. Keys of removed features are among them:
DeepSpeed itself refuses those aloud.
"""

from __future__ import annotations

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
PRESETS = frozenset("llama bloom chatglm mixtral deepseek_v2 qwen2 phi3".split())
