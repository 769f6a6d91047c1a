"""Disables DeepSpeed's shared-memory all-reduce for CPUs (its operator `deepspeed_shm_comm`) on ranks.

It ignores the process group that it is given (tp=2 in a world of 4 sums all four ranks, silently), compiles for half a
minute at first use, and leaks 66 MiB per rank in /dev/shm (deepspeed 0.19.8, `deepspeed/comm/torch.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODULE = "deepspeed.comm.torch"


def disable() -> None:
    """Make DeepSpeed find no shared-memory operator, whether it has been imported or is imported later."""
    if _MODULE in sys.modules:
        _disable_in(sys.modules[_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _disable_in(module: ModuleType) -> None:
    module.build_shm_op = lambda: None  # type: ignore[attr-defined]  # what it returns where the operator is unavailable


class _WhenImported(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_disable(module: ModuleType) -> None:
                exec_module(module)
                _disable_in(module)

            spec.loader.exec_module = exec_and_disable  # type: ignore[method-assign]
        return spec
