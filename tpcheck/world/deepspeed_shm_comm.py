"""Disables DeepSpeed's shared-memory all-reduce for CPUs (its operator `deepspeed_shm_comm`) on ranks.

It ignores the process group that it is given (tp=2 in a world of 4 sums all four ranks, silently), compiles for half a
minute at first use, and leaks 66 MiB per rank in /dev/shm (deepspeed 0.19.8, `deepspeed/comm/torch.py`).
"""

from __future__ import annotations

from types import ModuleType

from tpcheck.world.when_imported import when_imported


def disable() -> None:
    """Make DeepSpeed find no shared-memory operator, whether it has been imported or is imported later."""
    when_imported("deepspeed.comm.torch", _disable_in)


def _disable_in(module: ModuleType) -> None:
    module.build_shm_op = lambda: None  # type: ignore[attr-defined]  # what it returns where the operator is unavailable
