"""`@given` over ranks: Hypothesis draws, shrinks and judges in pytest's process; each example runs on the ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

_SETTINGS = "_hypothesis_internal_use_settings"  # where Hypothesis's own pytest plugin changes them


def is_given(item: pytest.Function) -> bool:
    return bool(getattr(item.obj, "is_hypothesis_test", False)) and hasattr(item.obj, "hypothesis")


def inner_test(item: pytest.Function) -> Callable[..., Any]:
    """Return the function that the test's author wrote."""
    function: Callable[..., Any] = item.obj.hypothesis.inner_test if is_given(item) else item.obj
    return function


def run_examples(
    item: pytest.Function, fixtures: Mapping[str, Any], run_example: Callable[[dict[str, Any]], None]
) -> None:
    """Let Hypothesis call `run_example(arguments)`, by name, in place of the test; a method's `self` is left out.

    `inner_test` is the place that Hypothesis documents for libraries that run tests elsewhere:
    https://hypothesis.readthedocs.io/en/latest/extras.html#custom-function-execution
    """
    handle = item.obj.hypothesis
    original = handle.inner_test
    signature = inspect.signature(original)
    own_name = next(iter(signature.parameters)) if inspect.ismethod(item.obj) else None

    @functools.wraps(original)  # the database of failed examples goes by name and source
    def on_ranks(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        bound = signature.bind(*args, **kwargs).arguments
        run_example({name: value for name, value in bound.items() if name != own_name})

    handle.inner_test = on_ranks
    try:
        with _without_explanation(item.obj):
            item.obj(**fixtures)
    finally:
        handle.inner_test = original


@contextmanager
def _without_explanation(test: Any) -> Iterator[None]:
    """Leave out the phase that explains a failure by the lines that ran: the test's own lines run elsewhere."""
    from hypothesis import Phase, settings

    function = getattr(test, "__func__", test)
    before = getattr(function, _SETTINGS, None)
    if before is not None:
        phases = tuple(phase for phase in before.phases if phase is not Phase.explain)
        setattr(function, _SETTINGS, settings(parent=before, phases=phases))
    try:
        yield
    finally:
        if before is not None:
            setattr(function, _SETTINGS, before)
