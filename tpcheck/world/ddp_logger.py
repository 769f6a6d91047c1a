"""Lets DistributedDataParallel live with TORCH_DISTRIBUTED_DEBUG=DETAIL on gloo.

Under DETAIL torch wraps process groups, and the logger that DDP starts takes the wrapper for a gloo group: a segmentation
fault in `c10d::Logger::set_env_variables` (torch 2.13). What that logger collects is for torch's own telemetry.
"""

from __future__ import annotations


def leave_out_under_detail() -> None:
    """Make DDP skip its construction log, where groups are wrapped."""
    from torch import distributed as dist

    if dist.get_debug_level() != dist.DebugLevel.DETAIL:
        return

    class WithoutConstructionLog(dist.Logger):
        def set_construction_data_and_log(self, *_: object, **__: object) -> None:
            """Log nothing."""

    dist.Logger = WithoutConstructionLog  # type: ignore[misc]
