"""Runs the body of one test on the ranks of its world, once or once per example of Hypothesis."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from tpcheck.core.errors import RankFailure, RankOutcome, TpcheckError, UsageError
from tpcheck.pytest_plugin.failure_report import exception_of
from tpcheck.pytest_plugin.fixtures import (
    CONTROLLER_ONLY_FIXTURES,
    RankPlaceholder,
    has_instance,
    pickled_settings,
    test_reference,
)
from tpcheck.pytest_plugin.messages import (
    BodyCall,
    BodyFailed,
    BodyPassed,
    Placeholder,
    current_filters,
    reissue_warnings,
)
from tpcheck.pytest_plugin.run_on_rank import prepare, run_body
from tpcheck.world.channel import dumps
from tpcheck.world.world import World

_SETTINGS = "_hypothesis_internal_use_settings"  # the attribute that Hypothesis's pytest plugin changes


def is_hypothesis_test(item: pytest.Function) -> bool:
    return bool(getattr(item.obj, "is_hypothesis_test", False)) and hasattr(item.obj, "hypothesis")


def test_function(item: pytest.Function) -> Callable[..., Any]:
    """Return the test function, without `@given`."""
    function: Callable[..., Any] = item.obj.hypothesis.inner_test if is_hypothesis_test(item) else item.obj
    return function


def run_examples(
    item: pytest.Function, fixtures: Mapping[str, Any], run_example: Callable[[dict[str, Any]], None]
) -> None:
    """Make Hypothesis call `run_example` with the arguments by name instead of the test; a method's `self` is dropped.

    Hypothesis documents `inner_test` for libraries that run tests elsewhere:
    https://hypothesis.readthedocs.io/en/latest/extras.html#custom-function-execution
    """
    handle = item.obj.hypothesis
    original = handle.inner_test
    signature = inspect.signature(original)
    self_name = next(iter(signature.parameters)) if inspect.ismethod(item.obj) else None

    @functools.wraps(original)  # the example database uses name and source as key
    def on_ranks(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        bound = signature.bind(*args, **kwargs).arguments
        run_example({name: value for name, value in bound.items() if name != self_name})

    handle.inner_test = on_ranks
    try:
        with _without_explanation(item.obj):
            item.obj(**fixtures)
    finally:
        handle.inner_test = original


@contextmanager
def _without_explanation(test: Any) -> Iterator[None]:
    """Disable the phase that explains a failure by the lines that ran: the lines of the test run in other processes."""
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


def pickled_arguments(arguments: Mapping[str, Any]) -> bytes:
    """Return the arguments as bytes, by name. They are pickled together, so that shared objects remain shared.

    Raises:
        UsageError: An argument cannot be sent to the ranks; names it and the reason.
    """
    for name, value in arguments.items():
        if name in CONTROLLER_ONLY_FIXTURES:
            raise UsageError(name, value, f"a fixture that can be sent to the ranks: {CONTROLLER_ONLY_FIXTURES[name]}")
    values = {
        name: Placeholder.RANK if isinstance(value, RankPlaceholder) else value for name, value in arguments.items()
    }
    return _pickled(values, "argument or fixture")


def _pickled(values: Mapping[str, Any], what: str, *, prefix: str = "") -> bytes:
    """Return the values as bytes, by name.

    Raises:
        UsageError: A value does not pickle; names it and the reason.
    """
    try:
        return dumps(dict(values))
    except Exception as error:
        for name, value in values.items():
            try:
                dumps(value)
            except Exception as value_error:  # noqa: PERF203 - on the way to a failure
                raise UsageError(prefix + name, value, _expected(what, value, value_error)) from value_error
        raise UsageError("arguments", tuple(values), _expected(what, None, error)) from error


def _expected(what: str, value: Any, error: Exception) -> str:
    if type(value).__module__.startswith("hypothesis."):
        return "a value: Hypothesis draws in pytest's process only, so pass every strategy to @given"
    return (
        f"an {what} that pickles, because it is created in pytest's process and sent to the ranks; "
        f"create it in the body instead ({type(error).__name__}: {error})"
    )


class BodyRunner:
    """Runs the body of one test on ranks. Use it in a `with` statement: its world is closed at the end.

    Attributes:
        outcomes: How each rank ended the last run, and what it printed.
    """

    def __init__(self, item: pytest.Function, open_world: Callable[[], World]) -> None:
        self.outcomes: tuple[RankOutcome, ...] = ()
        self._item = item
        self._open_world = open_world
        self._worlds = ExitStack()
        self._world: World | None = None
        self._reference = test_reference(item)
        self._function = dumps(test_function(item)) if self._reference is None else None

    def __enter__(self) -> BodyRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._worlds.close()

    def run(self, arguments: Mapping[str, Any]) -> None:
        """Run the body with these arguments, in the processes of the last run if it passed.

        Raises:
            BaseException: What the rank raised that failed first, or `RankFailure` if it died or hung.
        """
        __tracebackhide__ = True
        body = self._body(arguments)
        world = self._world = self._world or self._worlds.enter_context(self._open_world())
        error: BaseException | None = None
        try:
            self._check_reports(world.run(run_body, body), world)
        except RankFailure as failure:
            error = exception_of(failure)
            reissue_warnings(_warnings_of(failure))
        self.outcomes = world.outcomes
        if error is not None:
            raise error  # outside of the handler: Hypothesis distinguishes failures by their context, too

    def run_in_new_processes(self, arguments: Mapping[str, Any]) -> None:
        """Run the body in new processes."""
        __tracebackhide__ = True
        self._worlds.close()
        self._world = None
        self.run(arguments)

    def run_example(self, arguments: Mapping[str, Any]) -> None:
        """Run the body; if it fails, start new processes for the next example."""
        __tracebackhide__ = True
        try:
            self.run(arguments)
        except Exception:
            self.prepare()
            raise

    def prepare(self) -> None:
        """Start the processes and import the test, so that Hypothesis does not count it to the time of an example."""
        body = self._body({})
        self._world = self._world or self._worlds.enter_context(self._open_world())
        outcomes = self.outcomes
        with suppress(RankFailure):  # the next example fails for the same reason, and reports it
            self._world.run(prepare, body)
        self.outcomes = outcomes

    def _body(self, arguments: Mapping[str, Any]) -> BodyCall:
        attributes = vars(self._item.obj.__self__) if has_instance(self._item) else {}
        return BodyCall(
            nodeid=self._item.nodeid,
            settings=pickled_settings(self._item.config),
            filters=current_filters(),
            test=self._reference,
            function=self._function,
            arguments=pickled_arguments(arguments),
            attributes=_pickled(attributes, "attribute", prefix="self."),
        )

    def _check_reports(self, reports: tuple[Any, ...], world: World) -> None:
        """Raise TpcheckError unless every rank has reported a pass; issue the warnings of ranks."""
        expected = tuple(range(world.topology.world_size))
        passed = [report for report in reports if isinstance(report, BodyPassed)]
        if tuple(report.rank for report in passed) != expected:
            raise TpcheckError(f"ranks {[report.rank for report in passed]} reported a pass, of {list(expected)}")
        reissue_warnings(warning for report in passed for warning in report.warnings)
        returned = next((report.returned for report in passed if report.returned is not None), None)
        if returned is not None:
            warning = pytest.PytestReturnNotNoneWarning(
                f"Test functions should return None, but {self._item.nodeid} returned {returned}."
            )
            path, lineno, _ = self._item.location
            warnings.warn_explicit(warning, type(warning), path, (lineno or 0) + 1)


def _warnings_of(failure: RankFailure) -> list[Any]:
    details = [outcome.details for outcome in failure.outcomes if isinstance(outcome.details, BodyFailed)]
    return [warning for rank_details in details for warning in rank_details.warnings]
