"""The hooks in pytest's process: check the marker of a test, run its body on ranks, report their outcomes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import Any

import pytest
from _pytest.skipping import evaluate_skip_marks

from tpcheck.core.errors import RankOutcome, TpcheckError, UsageError
from tpcheck.pytest_plugin.body_runner import BodyRunner, is_hypothesis_test, run_examples, test_function
from tpcheck.pytest_plugin.failure_report import captured_sections, failure_repr, origin_of
from tpcheck.pytest_plugin.launched import OtherRank, Rank0, is_shared, launched_session
from tpcheck.pytest_plugin.options import is_marked, marked_world, options_of, preload_of
from tpcheck.pytest_plugin.run_on_rank import ASYNC_MESSAGE
from tpcheck.world.environment import visible_gpus
from tpcheck.world.forkserver_client import ForkserverClient, get_forkserver
from tpcheck.world.world import THIS_MACHINE, World

_UNMARKED = "tp_rank exists only on the ranks of a world: mark the test with `@pytest.mark.tpcheck(tp=2)`"
_NOT_A_FUNCTION = "the marker `tpcheck` works on test functions and methods of plain classes, not of unittest.TestCase"
_forkserver_key = pytest.StashKey[ForkserverClient]()
_open_world_key = pytest.StashKey[Callable[[], World]]()
_outcomes_key = pytest.StashKey[Iterable[RankOutcome]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the forkserver if a test needs it; it is ready some seconds later."""
    config = session.config
    num_tests = sum(map(is_shared, session.items))
    num_workers = getattr(config, "workerinput", {}).get(
        "workercount", 1
    )  # under xdist each worker runs a part of the tests
    if config.getoption("collectonly") or config.getoption("setuponly") or num_tests < num_workers:
        return
    launched = launched_session(config)
    if launched is not None and not launched.forks:
        return
    options = options_of(config)
    uses_gpus = options.device != "cpu" and visible_gpus(os.environ) > 0
    config.stash[_forkserver_key] = get_forkserver("cuda" if uses_gpus else "cpu", preload_of(options))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for the imports before the first test on ranks begins, and with it the time that pytest-timeout measures."""
    forkserver = item.config.stash.get(_forkserver_key, None)
    if forkserver is not None and is_shared(item) and evaluate_skip_marks(item) is None:
        del item.config.stash[_forkserver_key]
        with suppress(TpcheckError):  # the test says why
            forkserver.wait_until_ready()
    return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that cannot run on ranks, before its fixtures are set up."""
    launched = launched_session(item.config)
    if isinstance(launched, OtherRank):
        return
    if is_marked(item):
        open_world = _world_factory(item)
        if isinstance(open_world, str):
            pytest.fail(open_world, pytrace=False)
        if launched is not None and (topology := open_world().topology).world_size != launched.world_size:
            reason = f"needs {topology.world_size} ranks, the launcher started {launched.world_size}"
            raise pytest.skip.Exception(reason, _use_item_location=True)
        item.stash[_open_world_key] = open_world
    elif "tp_rank" in _fixture_names(item):
        pytest.fail(_UNMARKED, pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    """Run the body on ranks instead of calling the function here."""
    open_world = pyfuncitem.stash.get(_open_world_key, None)
    if open_world is None:
        return None
    fixtures = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    usage_error: UsageError | None = None
    with BodyRunner(pyfuncitem, open_world) as runner:
        try:
            _run(pyfuncitem, runner, fixtures)
        except UsageError as error:
            if origin_of(error) is not None:  # the body raised it
                raise
            usage_error = error
        finally:
            pyfuncitem.stash[_outcomes_key] = runner.outcomes
    if usage_error is not None:
        pytest.fail(f"UsageError: {usage_error}", pytrace=False)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the failure as the rank saw it, and what every rank printed."""
    test_report = yield
    if call.when == "call" and _outcomes_key in item.stash:
        test_report.sections.extend(captured_sections(item.stash[_outcomes_key], call.excinfo))
        if call.excinfo is not None and not isinstance(test_report.longrepr, tuple):  # a skip
            test_report.longrepr = failure_repr(call.excinfo, test_report.longrepr)
    return test_report


def _world_factory(item: pytest.Item) -> Callable[[], World] | str:
    """Return what opens the world of a marked test, or why the test cannot run on ranks."""
    if not isinstance(item, pytest.Function) or _is_unittest(item):
        return _NOT_A_FUNCTION
    if _is_async(test_function(item)):
        return ASYNC_MESSAGE
    try:
        launched = launched_session(item.config)
        machines = launched.machines if isinstance(launched, Rank0) else THIS_MACHINE
        open_world = marked_world(item, options_of(item.config), machines)
        open_world().close()  # checks the arguments; starts no process
    except UsageError as error:
        return f"UsageError in pytest.mark.tpcheck: {error}"
    return open_world


def _run(item: pytest.Function, runner: BodyRunner, fixtures: dict[str, Any]) -> None:
    __tracebackhide__ = True
    if not is_hypothesis_test(item):
        runner.run(fixtures)
    elif options_of(item.config).fresh:
        run_examples(item, fixtures, runner.run_in_new_processes)
    else:
        runner.prepare()
        run_examples(item, fixtures, runner.run_example)


def _fixture_names(item: pytest.Item) -> list[str]:
    names: list[str] = getattr(item, "fixturenames", [])
    return names


def _is_unittest(item: pytest.Function) -> bool:
    from unittest import TestCase

    return item.cls is not None and issubclass(item.cls, TestCase)


def _is_async(function: Any) -> bool:
    function = inspect.unwrap(function)
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
