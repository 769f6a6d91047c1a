"""Optimizers that are given a closure: the passes are inside their `step`, as Lightning's loops and LBFGS have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def with_closure_followed(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    follow: Callable[[], None],
    later: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Arguments | None:
    """Return the arguments of a step with a closure that `follow` is called after; None where there is no closure.

    What a hook before the step sees are then gradients of the step before, or none.

    Args:
        args, kwargs: As torch hands them to a hook before the step, the optimizer first.
        follow: Called when the closure has returned for the first time, inside the step.
        later: Context of the closure's later calls: optimizers that search along a line call it at other weights.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None
    has_returned = False

    def followed() -> Any:
        nonlocal has_returned
        if has_returned:
            with later():
                return closure()
        loss = closure()
        has_returned = True
        follow()
        return loss

    if len(args) > 1:
        return (args[0], followed, *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": followed}
