"""The one function that ranks call for a marked test: `run_body`."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from types import MethodType
from typing import Any

import pytest

from tpcheck.pytest_plugin.messages import Argument, Body, BodyPassed
from tpcheck.pytest_plugin.rank_config import import_as_pytest_does, rank_config
from tpcheck.pytest_plugin.rank_failure import body_failed
from tpcheck.pytest_plugin.warning_filters import as_messages, kept_warnings
from tpcheck.world import Rank
from tpcheck.world.pickling import loads

_ASYNC = "async tests do not run on ranks: start the event loop inside the body, as with asyncio.run"


def run_body(rank: Rank, body: Body) -> BodyPassed:
    """Call the test's function on this rank; an exception leaves with a `BodyFailed` in its `tpcheck_details`."""
    __tracebackhide__ = True
    function: Callable[..., Any] | None = None
    config: pytest.Config | None = None
    with kept_warnings(body.filters) as log:
        try:
            config = rank_config(body.settings)
            function = _function(body, config)
            arguments = loads(body.arguments)
            returned = function(**{name: _own(value, rank) for name, value in arguments.items()})
            if hasattr(returned, "__await__") or hasattr(returned, "__aiter__"):
                pytest.fail(_ASYNC, pytrace=False)
        except BaseException as error:
            details = body_failed(error, function=function, config=config, warnings=as_messages(log))
            error.tpcheck_details = details  # type: ignore[attr-defined]  # any exception takes attributes
            raise
    return BodyPassed(rank.rank, as_messages(log), None if returned is None else repr(type(returned)))


def prepare(_rank: Rank, body: Body) -> None:
    """Import what the body needs, so that the first example of a `@given` test takes no longer than the others."""
    with kept_warnings(body.filters):
        _function(body, rank_config(body.settings))


def _function(body: Body, config: pytest.Config) -> Callable[..., Any]:
    """Return the function to call, with its instance where it is a method."""
    __tracebackhide__ = True
    if body.function is not None:
        by_value: Callable[..., Any] = loads(body.function)
        return by_value
    assert body.test is not None
    modules = [import_as_pytest_does(file, config) for file in body.test.imports]
    *outer, name = body.test.qualname.split(".")
    holder: Any = reduce(getattr, outer, modules[-1])
    function: Callable[..., Any] = _without_given(getattr(holder, name))
    if not body.test.has_instance:
        return function
    instance = holder()
    vars(instance).update(loads(body.instance))
    return MethodType(function, instance)


def _without_given(function: Any) -> Callable[..., Any]:
    """Return what `@given` wraps: examples are drawn in pytest's process."""
    handle = getattr(function, "hypothesis", None)
    inner: Callable[..., Any] = getattr(handle, "inner_test", function)
    return inner


def _own(value: Any, rank: Rank) -> Any:
    return rank if value is Argument.RANK else value
