"""pytest's side: checks what a marked test asks for, runs its body on ranks, and reports how they ended."""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator, Iterable
from typing import Any

import pytest

from tpcheck.core.errors import RankOutcome, UsageError
from tpcheck.pytest_plugin import report
from tpcheck.pytest_plugin.fixtures import tp_spawn
from tpcheck.pytest_plugin.options import WorldRequest, is_marked, marked_request, options_of, preloaded
from tpcheck.pytest_plugin.report import origin_of
from tpcheck.pytest_plugin.runner import BodyRunner, inner_test, is_given, run_examples
from tpcheck.world import launcher
from tpcheck.world.environment import visible_gpus

_UNMARKED = "tp_rank exists on the ranks of a world alone: mark the test with `@pytest.mark.tpcheck(tp=2)`"
_ASYNC = "async tests do not run on ranks: start the event loop inside the body, as with asyncio.run"
_NOT_A_FUNCTION = "marked `tpcheck`, which works on test functions and methods of plain classes, not on unittest's"
_request_key = pytest.StashKey[WorldRequest]()
_outcomes_key = pytest.StashKey[Iterable[RankOutcome]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the process that ranks are forked from, if a test will need it; it is ready some seconds later."""
    config = session.config
    num_tests = sum(1 for item in session.items if is_marked(item) or tp_spawn.__name__ in _fixture_names(item))
    num_workers = getattr(config, "workerinput", {}).get("workercount", 1)  # under xdist: each has a share of the tests
    if config.getoption("collectonly") or config.getoption("setuponly") or num_tests < num_workers:
        return
    options = options_of(config)
    uses_gpus = options.device != "cpu" and visible_gpus(os.environ) > 0
    launcher.template("cuda" if uses_gpus else "cpu", preloaded(options))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a test that cannot run on ranks, before any fixture is made for it."""
    if is_marked(item):
        found = _request(item)
        if isinstance(found, str):
            pytest.fail(found, pytrace=False)
        item.stash[_request_key] = found
    elif "tp_rank" in _fixture_names(item):
        pytest.fail(_UNMARKED, pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    """Run the body on ranks, in the place where pytest would call the function."""
    request = pyfuncitem.stash.get(_request_key, None)
    if request is None:
        return None
    fixtures = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    usage: UsageError | None = None
    with BodyRunner(pyfuncitem, request.open) as runner:
        try:
            _run(pyfuncitem, runner, fixtures)
        except UsageError as error:
            if origin_of(error) is not None:  # what the body raised
                raise
            usage = error
        finally:
            pyfuncitem.stash[_outcomes_key] = runner.outcomes
    if usage is not None:
        pytest.fail(f"UsageError: {usage}", pytrace=False)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the culprit's own account of a failure, and what every rank printed."""
    made = yield
    if call.when == "call" and _outcomes_key in item.stash:
        made.sections.extend(report.captured_sections(item.stash[_outcomes_key], call.excinfo))
        if call.excinfo is not None and not isinstance(made.longrepr, tuple):  # skips are told by a tuple
            made.longrepr = report.failure_repr(call.excinfo, made.longrepr)
    return made


def _request(item: pytest.Item) -> WorldRequest | str:
    """Return the world that a marked test asks for, or what is wrong with the test."""
    if not isinstance(item, pytest.Function) or _is_unittest(item):
        return _NOT_A_FUNCTION
    if _is_async(inner_test(item)):
        return _ASYNC
    try:
        request = marked_request(item, options_of(item.config))
        request.open().close()  # starts no process: it checks the rest
    except UsageError as error:
        return f"UsageError in pytest.mark.tpcheck: {error}"
    return request


def _run(item: pytest.Function, runner: BodyRunner, fixtures: dict[str, Any]) -> None:
    __tracebackhide__ = True
    if not is_given(item):
        runner.run(fixtures)
    elif options_of(item.config).fresh:
        run_examples(item, fixtures, runner.run_fresh)
    else:
        runner.prepare()
        run_examples(item, fixtures, runner.run_again)


def _fixture_names(item: pytest.Item) -> list[str]:
    names: list[str] = getattr(item, "fixturenames", [])
    return names


def _is_unittest(item: pytest.Function) -> bool:
    from unittest import TestCase

    return item.cls is not None and issubclass(item.cls, TestCase)


def _is_async(function: Any) -> bool:
    function = inspect.unwrap(function)
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
