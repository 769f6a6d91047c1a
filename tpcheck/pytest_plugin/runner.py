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
from tpcheck.pytest_plugin.fixtures import STAY_BEHIND, RankPlaceholder, has_instance, pickled_settings, test_reference
from tpcheck.pytest_plugin.messages import Argument, Body, BodyFailed, BodyPassed
from tpcheck.pytest_plugin.rank_body import prepare, run_body
from tpcheck.pytest_plugin.report import exception_of
from tpcheck.pytest_plugin.warning_filters import current_filters, give_again
from tpcheck.world.channel import dumps
from tpcheck.world.world import World

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


def packed_arguments(arguments: Mapping[str, Any]) -> bytes:
    """Return the arguments as bytes, by name; pickled together, so that what two share they share on the ranks.

    Raises:
        UsageError: An argument cannot follow; says which and why.
    """
    for name, value in arguments.items():
        if name in STAY_BEHIND:
            raise UsageError(name, value, f"a fixture that can be sent to the ranks: {STAY_BEHIND[name]}")
    own = {name: _own(value) for name, value in arguments.items()}
    try:
        return dumps(own)
    except Exception as error:
        raise _culprit(own, "argument or fixture", error) from error


def packed_instance(attributes: Mapping[str, Any]) -> bytes:
    """Return the attributes of a test's instance as bytes.

    Raises:
        UsageError: One does not pickle; says which and why.
    """
    try:
        return dumps(dict(attributes))
    except Exception as error:
        raise _culprit({f"self.{name}": value for name, value in attributes.items()}, "attribute", error) from error


def _own(value: Any) -> Any:
    return Argument.RANK if isinstance(value, RankPlaceholder) else value


def _culprit(values: Mapping[str, Any], what: str, error: Exception) -> UsageError:
    for name, value in values.items():
        own_error = _why_not(value)
        if own_error is not None:
            return UsageError(name, value, _sendable(what, value, own_error))
    return UsageError("arguments", tuple(values), _sendable(what, None, error))


def _why_not(value: Any) -> Exception | None:
    try:
        dumps(value)
    except Exception as error:
        return error
    return None


def _sendable(what: str, value: Any, error: Exception) -> str:
    if type(value).__module__.startswith("hypothesis."):
        return "a value: Hypothesis draws in pytest's process alone, so name every strategy in @given"
    return (
        f"an {what} that pickles, because it is made in pytest's process and sent to the ranks; "
        f"build it in the body instead ({type(error).__name__}: {error})"
    )


class BodyRunner:
    """Use it in a `with` statement: what it opened is closed at the end.

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
        self._function = dumps(inner_test(item)) if self._reference is None else None

    def __enter__(self) -> BodyRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._worlds.close()

    def run(self, arguments: Mapping[str, Any]) -> None:
        """Run the body with these arguments, in the processes of the last run where it passed.

        Raises:
            BaseException: What the culprit's body raised, or `RankFailure` for a rank that died or hung.
        """
        __tracebackhide__ = True
        body = self._body(arguments)
        world = self._world = self._world or self._worlds.enter_context(self._open_world())
        error: BaseException | None = None
        try:
            self._judge(world.run(run_body, body), world)
        except RankFailure as failure:
            error = exception_of(failure)
            give_again(_warnings(failure))
        self.outcomes = world.outcomes
        if error is not None:
            raise error  # not in the handler: Hypothesis tells failures apart by their context, too

    def run_fresh(self, arguments: Mapping[str, Any]) -> None:
        """Run the body in processes of its own."""
        __tracebackhide__ = True
        self._worlds.close()
        self._world = None
        self.run(arguments)

    def run_again(self, arguments: Mapping[str, Any]) -> None:
        """Run one of many examples; where it fails, the next one finds the processes started again."""
        __tracebackhide__ = True
        try:
            self.run(arguments)
        except Exception:
            self.prepare()
            raise

    def prepare(self) -> None:
        """Start the processes and import the test, before anybody looks at the clock."""
        body = self._body({})
        self._world = self._world or self._worlds.enter_context(self._open_world())
        outcomes = self.outcomes
        with suppress(RankFailure):  # the example that comes next meets the same, and tells it
            self._world.run(prepare, body)
        self.outcomes = outcomes

    def _body(self, arguments: Mapping[str, Any]) -> Body:
        attributes = vars(self._item.obj.__self__) if has_instance(self._item) else {}
        return Body(
            nodeid=self._item.nodeid,
            settings=pickled_settings(self._item.config),
            filters=current_filters(),
            test=self._reference,
            function=self._function,
            arguments=packed_arguments(arguments),
            instance=packed_instance(attributes),
        )

    def _judge(self, reports: tuple[Any, ...], world: World) -> None:
        """Make sure that every rank says it ran this body to its end."""
        expected = tuple(range(world.topology.world_size))
        passed = [report for report in reports if isinstance(report, BodyPassed)]
        if tuple(report.rank for report in passed) != expected:
            raise TpcheckError(f"ranks {[report.rank for report in passed]} reported a pass, of {list(expected)}")
        give_again(warning for report in passed for warning in report.warnings)
        returned = next((report.returned for report in passed if report.returned is not None), None)
        if returned is not None:
            warning = pytest.PytestReturnNotNoneWarning(
                f"Test functions should return None, but {self._item.nodeid} returned {returned}."
            )
            path, lineno, _ = self._item.location
            warnings.warn_explicit(warning, type(warning), path, (lineno or 0) + 1)


def _warnings(failure: RankFailure) -> list[Any]:
    details = [outcome.details for outcome in failure.outcomes if isinstance(outcome.details, BodyFailed)]
    return [warning for one in details for warning in one.warnings]
