"""Ways to plant something in the course of training: after the backward pass, after a step, in a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tpcheck.faults.fault import Live


def hook_gradient(live: Live, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Let `change` make another gradient of a parameter's own, before it is accumulated."""
    live.parameter(name).register_hook(change)


def after_step(live: Live, action: Callable[[int], None]) -> None:
    """Call `action` with the number of the step after each of them."""
    engine = live.candidate.engine
    step = engine.step
    taken = [0]

    def stepping(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        action(taken[0])
        taken[0] += 1
        return result

    engine.step = stepping


def before_step(live: Live, action: Callable[[int], None]) -> None:
    """Call `action` with the number of the step before each of them, once the gradients have been compared."""
    engine = live.candidate.engine
    step = engine.step
    taken = [0]

    def stepping(*args: Any, **kwargs: Any) -> Any:
        action(taken[0])
        taken[0] += 1
        return step(*args, **kwargs)

    engine.step = stepping


def after_backward(live: Live, action: Callable[[int], None]) -> None:
    """Call `action` with the number of the step after each backward pass, before the gradients are compared."""
    engine = live.candidate.engine
    backward = engine.backward
    taken = [0]

    def going_back(*args: Any, **kwargs: Any) -> Any:
        result = backward(*args, **kwargs)
        action(taken[0])
        taken[0] += 1
        return result

    engine.backward = going_back


def stale_after_step(live: Live, names: tuple[str, ...]) -> None:
    """Set parameters back to what they were before each step."""
    kept = {name: live.parameter(name).detach().clone() for name in names}

    def restore(step: int) -> None:
        for name, value in kept.items():
            live.parameter(name).data.copy_(value)

    after_step(live, restore)
