"""Options of a DeepSpeed configuration that change how a step is computed, and must not change what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Left out: round_robin_gradients, with which safe_get_full_grad of deepspeed 0.19.8 fails at dp 2, without TP, too: the
# gradients cannot be read.
OPTIONS: tuple[Mapping[str, Any], ...] = (
    {"tensor_parallel": {"tp_overlap_comm": True}},
    {"gradient_clipping": 0.01},
    {"zero_optimization": {"overlap_comm": True}},
    {"zero_optimization": {"reduce_scatter": False}},
    {"zero_optimization": {"contiguous_gradients": False}},
    {"zero_optimization": {"reduce_bucket_size": 500}},
    {"zero_optimization": {"stage3_param_persistence_threshold": 100}},
)
