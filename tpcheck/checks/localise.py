"""Where a run first goes wrong: events that are wrong although all that feeds them agrees."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from tpcheck.records import TensorKey


def first_divergences(events: Sequence[TensorKey], is_wrong: Callable[[TensorKey], bool]) -> list[TensorKey]:
    """Return the wrong events that nothing wrong feeds, in order.

    What comes out of a module (its outputs; backward, the gradients of its inputs) is fed by what went into it and by
    all that happened inside. What goes into a module is fed by all that happened before in the module around it.

    Args:
        events: The events of one phase of one step, in order.
        is_wrong: Whether an event differs from the reference.
    """
    called = {event.module for event in events}
    wrong_before: list[TensorKey] = []
    roots = []
    for event in events:
        if is_wrong(event):
            scope = scope_of(event, called)
            if not any(is_inside(earlier.module, scope) for earlier in wrong_before):
                roots.append(event)
            wrong_before.append(event)
    return roots


def scope_of(event: TensorKey, called: Collection[str]) -> str:
    """Return the module whose own code made the event: for what went into a module, the nearest called one around it.

    Containers such as a ModuleList are never called.
    """
    module = event.module
    if comes_out(event):
        return module
    while module:
        module = module.rpartition(".")[0]
        if module in called:
            break
    return module


def is_inside(module: str, scope: str) -> bool:
    """Return whether `module` is `scope` or one of its submodules."""
    return not scope or module == scope or module.startswith(f"{scope}.")


def comes_out(event: TensorKey) -> bool:
    """Return whether the event is a result of its module rather than something handed to it."""
    return event.role == ("output" if event.phase == "forward" else "input")
