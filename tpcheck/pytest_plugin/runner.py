"""Runs the body of one test on the ranks of its world, once or once per example."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from tpcheck.errors import RankFailure, RankOutcome, TpcheckError
from tpcheck.pytest_plugin.arguments import packed_arguments, packed_instance
from tpcheck.pytest_plugin.body import prepare, run_body
from tpcheck.pytest_plugin.given import inner_test
from tpcheck.pytest_plugin.messages import Body, BodyFailed, BodyPassed
from tpcheck.pytest_plugin.reference import has_instance, test_reference
from tpcheck.pytest_plugin.settings import pickled_settings
from tpcheck.pytest_plugin.verdict import exception_of
from tpcheck.pytest_plugin.warning_filters import current_filters, give_again
from tpcheck.world import World
from tpcheck.world.pickling import dumps


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
