"""`@given` over ranks: Hypothesis draws, shrinks and judges in pytest's process; each example runs on the ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest


def is_given(item: pytest.Function) -> bool:
    return bool(getattr(item.obj, "is_hypothesis_test", False)) and hasattr(item.obj, "hypothesis")


def inner_test(item: pytest.Function) -> Callable[..., Any]:
    """Return the function that the test's author wrote."""
    function: Callable[..., Any] = item.obj.hypothesis.inner_test if is_given(item) else item.obj
    return function


def run_examples(item: pytest.Function, fixtures: Mapping[str, Any], run_example: Callable[..., None]) -> None:
    """Let Hypothesis call `run_example(*args, **kwargs)` in place of the test; a method's `self` is left out.

    `inner_test` is the place that Hypothesis documents for libraries that run tests elsewhere:
    https://hypothesis.readthedocs.io/en/latest/extras.html#custom-function-execution
    """
    handle = item.obj.hypothesis
    original = handle.inner_test
    num_skipped = 1 if inspect.ismethod(item.obj) else 0

    @functools.wraps(original)  # the database of failed examples goes by name and source
    def on_ranks(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        run_example(*args[num_skipped:], **kwargs)

    handle.inner_test = on_ranks
    try:
        item.obj(**fixtures)
    finally:
        handle.inner_test = original
