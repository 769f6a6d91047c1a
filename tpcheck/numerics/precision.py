"""Computes in float64 everywhere: models and backends that ask for float32 inside are given float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

# Methods that ask for float32 by name rather than by a dtype argument.
_PROMOTED_METHODS = {torch.Tensor.float: torch.Tensor.double}
_FLOAT32, _FLOAT64 = torch.float32, torch.float64


class _PromoteFloat32(TorchFunctionMode):
    """Models cast to float32 inside (norms, softmax, rotary tables); the cast would be the largest error of a run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Called for every operation and attribute of every tensor: no call that can be left out.
        func = _PROMOTED_METHODS.get(func, func)
        args = [_FLOAT64 if arg is _FLOAT32 else arg for arg in args]
        if not kwargs:
            return func(*args)
        return func(*args, **{name: _FLOAT64 if value is _FLOAT32 else value for name, value in kwargs.items()})


@contextmanager
def everything_in_float64(enabled: bool = True) -> Iterator[None]:
    """Make float64 the default dtype and the answer to every request for float32, while inside.

    Backward passes are covered too: hooks and autograd functions that run in them.
    """
    if not enabled:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _PromoteFloat32() as mode, _active_in_backward(mode):
            yield
    finally:
        torch.set_default_dtype(default)


def torch_function_disabled() -> AbstractContextManager[None]:
    """Return a context in which float32 is float32 again, and a call on a small tensor costs a fifth.

    For code that names its dtypes: comparing tensors, and sending them.
    """
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


@contextmanager
def _active_in_backward(mode: TorchFunctionMode) -> Iterator[None]:
    """Keep `mode` active while the autograd engine runs.

    `backward` dispatches to the mode, and a mode is inactive while it handles a call; the engine passes the modes that
    are active when it starts on to the hooks that it calls.
    """
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def with_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run_backward(*args, **kwargs)

    with patch.object(torch.autograd, "_engine_run_backward", with_mode):
        yield


class _RaiseReducedPrecision(TorchFunctionMode):
    """Muon iterates in bfloat16: where a matrix is cut differently, rounding there would be as large as its step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.bfloat16 else func
        return func(*args, **(kwargs or {}))


def reduced_precision_raised(enabled: bool = True) -> AbstractContextManager[Any]:
    """Return a context, for an optimizer's step, in which requests for bfloat16 are given float64."""
    return _RaiseReducedPrecision() if enabled else nullcontext()
