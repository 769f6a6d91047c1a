"""Ways to inject a fault: other forward and backward passes, collectives, and moments of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.lab.faults.fault import Draw, Injection, Live, Place

Forward = Callable[[Live, Any, int, Tensor], Tensor]  # the layer, the tp_rank that was drawn, the layer's input


def replace_forward(forward: Forward, *patterns: str) -> Callable[[Draw], Injection]:
    """Return a draw of one of the layers whose names match, which gets another forward."""

    def draw_layer(draw: Draw) -> Injection:
        name, tp_rank = draw.module(*patterns), draw.tp_rank()

        def inject(live: Live) -> None:
            layer = live.module(name)
            layer.forward = lambda hidden: forward(live, layer, tp_rank, hidden)

        return Injection(inject, Place(modules=(name,)))

    return draw_layer


def wrap_forward(wrapper: Callable[..., Any], *patterns: str, or_weight: bool = False) -> Callable[[Draw], Injection]:
    """Return a draw of one of the modules, whose forward becomes `wrapper(live, tp_rank, forward, *args, **kwargs)`.

    Args:
        wrapper: Gets this rank's model, the tp_rank that was drawn, and the original forward with its arguments.
        patterns: Names of modules.
        or_weight: Whether a finding may also name the module's weight.
    """

    def draw_module(draw: Draw) -> Injection:
        name, tp_rank = draw.module(*patterns), draw.tp_rank()

        def inject(live: Live) -> None:
            module = live.module(name)
            forward = module.forward
            module.forward = lambda *args, **kwargs: wrapper(live, tp_rank, forward, *args, **kwargs)

        return Injection(inject, Place((name,), (f"{name}.weight",) if or_weight else ()))

    return draw_module


def change_gradient(change: Callable[[Live, int, Tensor], Tensor], *patterns: str) -> Callable[[Draw], Injection]:
    """Return a draw of one of the parameters, whose gradient becomes `change(live, tp_rank, gradient)`."""

    def draw_parameter(draw: Draw) -> Injection:
        name, tp_rank = draw.parameter(*patterns), draw.tp_rank()

        def inject(live: Live) -> None:
            live.parameter(name).register_hook(lambda gradient: change(live, tp_rank, gradient))

        return Injection(inject, Place(parameters=(name,)))

    return draw_parameter


def inject_always(inject: Callable[[Live], None], **place: tuple[str, ...]) -> Callable[[Draw], Injection]:
    """Return a draw that always injects the same fault, at `Place(**place)`: by default one of the whole run."""
    return lambda draw: Injection(inject, Place(**place))


def fault_of_the_backend(*patterns: str) -> Callable[[Draw], Injection]:
    """Return a draw that injects nothing: the backend has the fault by itself, in the modules whose names match."""
    return lambda draw: Injection(lambda live: None, Place(draw.modules_matching(*patterns) if patterns else ()))


def with_backward(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the tensor unchanged; its gradient goes through `change`."""
    changed: Tensor = _Backward.apply(tensor, change)  # type: ignore[no-untyped-call]
    return changed


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None


def with_value(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value`; its gradient goes to `tensor` unchanged."""
    result: Tensor = _WithValue.apply(tensor, value)  # type: ignore[no-untyped-call]
    return result


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        ctx.shape = tensor.shape
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        fits = gradients[0].shape == ctx.shape
        return gradients[0] if fits else gradients[0].new_zeros(ctx.shape), None


def all_reduced(tensor: Tensor, group: Any) -> Tensor:
    """Return the sum over the group; the gradient goes to `tensor` unchanged."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return with_value(tensor, total)


def all_gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """Return every rank's tensor, all of one shape; gradients end here."""
    local = tensor.detach().contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local, group=group)
    return parts


def after_step(live: Live, action: Callable[[int], None]) -> None:
    """Call `action(step)` after each optimizer step."""
    _wrap_method(live.candidate.engine, "step", after=action)


def before_step(live: Live, action: Callable[[int], None]) -> None:
    """Call `action(step)` before each optimizer step, after the gradients were compared."""
    _wrap_method(live.candidate.engine, "step", before=action)


def after_backward(live: Live, action: Callable[[int], None]) -> None:
    """Call `action(step)` after each backward pass, before the gradients are compared."""
    _wrap_method(live.candidate.engine, "backward", after=action)


def _do_nothing(step: int) -> None: ...


def _wrap_method(
    engine: Any, name: str, before: Callable[[int], None] = _do_nothing, after: Callable[[int], None] = _do_nothing
) -> None:
    method, num_calls = getattr(engine, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        before(num_calls)
        result = method(*args, **kwargs)
        after(num_calls)
        num_calls += 1
        return result

    setattr(engine, name, wrapped)


def restore_after_step(live: Live, names: tuple[str, ...]) -> None:
    """Reset parameters after each optimizer step to their values before the first."""
    kept = {name: live.parameter(name).detach().clone() for name in names}

    def restore(step: int) -> None:
        for name, value in kept.items():
            live.parameter(name).data.copy_(value)

    after_step(live, restore)
