"""Lets DistributedDataParallel live with TORCH_DISTRIBUTED_DEBUG=DETAIL on gloo.

Under DETAIL torch wraps process groups, and the logger that DDP starts takes the wrapper for a gloo group: it crashes
in `c10d::Logger::set_env_variables` (torch 2.13). What that logger collects is for torch's own telemetry.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def leave_out_under_detail() -> None:
    """Make DDP skip its construction log, where groups are wrapped."""
    dist: Any = import_module("torch.distributed")  # exports these names without declaring them
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:
        dist.Logger = type("Logger", (dist.Logger,), {"set_construction_data_and_log": lambda *_, **__: None})
