"""Ways to inject a fault: other forward and backward passes, collectives, and moments of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.lab.faults.fault import Draw, Live, ModelFault, Place, Planting


def gradient_fault(
    name: str, what: str, draw: Callable[[Draw], Planting], *, causes: tuple[str | None, ...], **options: Any
) -> ModelFault:
    """Return the row of a gradient that is wrong at once."""
    checks = ("gradients_match_reference",)
    return ModelFault(name, "backward", what, draw, checks=checks, causes=causes, **{"steps": 1, **options})


def with_backward(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the tensor as it is, whose gradient goes through `change`."""
    changed: Tensor = _Backward.apply(tensor, change)  # type: ignore[no-untyped-call]
    return changed


class _Backward(torch.autograd.Function):
    """Passes a tensor on as it is, and its gradient through `change`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None


Forward = Callable[[Live, Any, int, Tensor], Tensor]  # the layer, the tp_rank that was drawn, its input


def instead(forward: Forward, *patterns: str) -> Callable[[Draw], Planting]:
    """Return what draws one of the layers and gives it another forward."""

    def drawn(draw: Draw) -> Planting:
        name, tp_rank = draw.module(*patterns), draw.tp_rank()

        def plant(live: Live) -> None:
            layer = live.module(name)
            layer.forward = lambda hidden: forward(live, layer, tp_rank, hidden)

        return Planting(plant, Place(modules=(name,)))

    return drawn


def collective_fault(
    name: str, what: str, draw: Callable[[Draw], Planting], causes: tuple[str | None, ...], **options: Any
) -> ModelFault:
    checks = ("outputs_match_reference",)
    return ModelFault(
        name, "forward collectives", what, draw, **{"checks": checks, "causes": causes, "steps": 1, **options}
    )


def with_value(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value`, whose gradient goes to `tensor` as it is."""
    result: Tensor = _WithValue.apply(tensor, value)  # type: ignore[no-untyped-call]
    return result


def all_reduced(tensor: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum over the group."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op, group=group)
    return with_value(tensor, total)


def all_gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """Return every rank's tensor, all of one shape; gradients end here."""
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return parts


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        ctx.shape = tensor.shape
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        fits = gradients[0].shape == ctx.shape
        return gradients[0] if fits else gradients[0].new_zeros(ctx.shape), None


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


def optimizer_fault(name: str, what: str, draw: Callable[[Draw], Planting], **options: Any) -> ModelFault:
    return ModelFault(name, "norm and optimizer", what, draw, **options)


def everywhere(plant: Callable[[Live], None]) -> Callable[[Draw], Planting]:
    """Return what plants a fault of the whole run, which no draw changes."""
    return lambda draw: Planting(plant, Place())
