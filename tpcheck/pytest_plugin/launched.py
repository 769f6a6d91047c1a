"""pytest on every rank of a launcher: rank 0 runs the shared tests over all of them, and the others take its verdicts.

A shared test is one that is marked, or uses `tp_spawn`. The process of rank 0 is its controller, as where there is no
launcher: fixtures are evaluated there, Hypothesis draws there. Its ranks are forked beside the launcher's processes.
The other processes go through the same stages of the same test, wait at each for what rank 0 says of it, and report
that. All other tests run on every rank, as without this plugin.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import Any, Literal, NoReturn

import pytest
from _pytest import junitxml
from _pytest.config import create_terminal_writer

from tpcheck.core.environment import WORLD_FOLDER_VARIABLE
from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.pytest_plugin.fixtures import tp_spawn
from tpcheck.pytest_plugin.messages import pickle_exception, unpickle_exception
from tpcheck.pytest_plugin.options import is_marked, options_of
from tpcheck.world.attach import is_launched, launched_rank
from tpcheck.world.launch import Launch, Link, LinkLost, has_launchers_store, say_absent
from tpcheck.world.launched_world import LaunchedMachines, Place, serve_worlds, this_place

# Once rank 0 has failed the others have this long to end: the launcher then ends them.
_END_LIMIT_S = 10.0
_OTHER_WAY = "--tpcheck-launcher spawn gives each rank worlds of its own"
_NAME = "tpcheck-launched"
_INNER_VARIABLE = "TPCHECK_LAUNCHED"  # set for what tests start: it has the launcher's variables, and is no rank

Stage = Literal["setup", "call", "teardown"]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a rank has collected, and where it is. Sent to rank 0, which answers with `Agreed`."""

    nodeids: tuple[str, ...]
    num_errors: int
    place: Place


@dataclass(frozen=True, slots=True)
class Agreed:
    """Whether all ranks have collected the same.

    Attributes:
        is_same: If not, rank 0 says what differs.
        forks: This process forks ranks.
    """

    is_same: bool
    forks: bool


@dataclass(frozen=True, slots=True)
class StageVerdict:
    """What rank 0 reports of one stage of a test.

    Attributes:
        exception: Pickled, None where there is none.
        longrepr: The reason of a skip, or the text of a failure.
    """

    nodeid: str
    when: Stage
    outcome: Literal["passed", "failed", "skipped"]
    longrepr: tuple[str, int, str] | str | None
    wasxfail: str | None
    exception: bytes | None

    def raise_exception(self) -> None:
        """Raise what was raised on rank 0, so that reports and other plugins see the same here."""
        if self.exception is None:
            return
        error = unpickle_exception(self.exception)
        raise pytest.fail.Exception(str(self.longrepr), pytrace=False) if error is None else error


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """No more tests run on rank 0."""

    reason: str


@dataclass(frozen=True, slots=True)
class RankEnded:
    """How the session of another rank has ended.

    Attributes:
        failures: What failed there and is not shared, as text, by name.
    """

    exitstatus: int
    failures: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Finish:
    """Exit with this status."""

    exitstatus: int


def is_shared(item: pytest.Item) -> bool:
    """Return whether rank 0 alone decides about this test."""
    return is_marked(item) or tp_spawn.__name__ in getattr(item, "fixturenames", ())


def launched_session(config: pytest.Config) -> Rank0 | OtherRank | None:
    """Return the part of this process in the tests of the launcher's ranks, None where it has none."""
    plugin = config.pluginmanager.get_plugin(_NAME)
    return plugin if isinstance(plugin, (Rank0, OtherRank)) else None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Keep the terminal of other ranks silent until it is known whether they have something to say."""
    try:
        if not _uses_launcher(session.config):
            return
        rank, _, _ = launched_rank(os.environ)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    session.config.pluginmanager.register(_BeforeConnection(session.config, rank), f"{_NAME}-collection")


def _uses_launcher(config: pytest.Config) -> bool:
    under_xdist = hasattr(config, "workerinput") or config.getoption("dist", "no") != "no"
    if under_xdist or options_of(config).launcher != "auto" or not is_launched():
        return False
    if WORLD_FOLDER_VARIABLE in os.environ or _INNER_VARIABLE in os.environ:  # pytest inside a test
        return False
    return launched_rank(os.environ)[1] > 1  # the one process of a launcher opens worlds of its own


class _Terminal:
    """What the terminal of another rank would have shown."""

    def __init__(self, config: pytest.Config) -> None:
        self._reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        self._buffer = io.StringIO()
        if self._reporter is not None:
            self._before = self._reporter._tw
            writer = create_terminal_writer(config, self._buffer)
            writer.hasmarkup = self._before.hasmarkup
            writer.fullwidth = self._before.fullwidth
            self._reporter._tw = writer

    def show(self) -> None:
        """Show it after all, and what follows."""
        if self._reporter is not None:
            self._reporter._tw = self._before
            self._before._file.write(self._buffer.getvalue())
            self._before._file.flush()


class _BeforeConnection:
    """Links the ranks once tests are collected, if some are shared."""

    def __init__(self, config: pytest.Config, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._terminal = _Terminal(config) if rank > 0 else None
        self._failures: dict[str, str] = {}
        self._is_connected = False
        os.environ[_INNER_VARIABLE] = "1"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failures[f"collection of {report.nodeid}"] = report.longreprtext

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not any(map(is_shared, session.items)):
            self._stay_alone(len(session.items))
            return
        try:
            launch = Launch()
            launch.connect(self._notify)
        except (TpcheckError, RuntimeError, OSError) as error:
            ranks = f"the launcher's {launched_rank(os.environ)[1]} ranks"
            raise pytest.UsageError(
                f"tests marked tpcheck run on {ranks}, and rank {self._rank} cannot join them: {error}. {_OTHER_WAY}."
            ) from error
        part: Rank0 | OtherRank
        if self._terminal is None:
            part = Rank0(session, launch, self._failures)
        else:
            part = OtherRank(session, launch, self._failures)
        self._is_connected = True
        session.config.pluginmanager.register(part, _NAME)
        part.agree()

    def _notify(self, text: str) -> None:
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"tpcheck: {text}")

    def pytest_unconfigure(self) -> None:
        """Show what has prevented the collection, as an error of a conftest."""
        os.environ.pop(_INNER_VARIABLE, None)
        if self._terminal is not None and not self._is_connected:
            self._terminal.show()

    def _stay_alone(self, num_items: int) -> None:
        if self._terminal is not None:
            self._terminal.show()
            self._terminal = None
        if has_launchers_store() and "torch" in sys.modules:
            with contextlib.suppress(TpcheckError, RuntimeError):
                say_absent(f"rank {self._rank} has collected none of them ({num_items} other tests)")


class Rank0:
    """The controller of shared tests."""

    def __init__(self, session: pytest.Session, launch: Launch, failures: dict[str, str]) -> None:
        self.forks = True
        self._session = session
        self._launch = launch
        self._failures = failures
        self._num_started = 0
        self._lost: dict[int, str] = {}
        self._ended: dict[int, RankEnded] = {}
        self._machines: LaunchedMachines | None = None
        atexit.register(launch.close)  # the other processes end after this one
        _set_default_handler(self._on_sigterm)

    @property
    def world_size(self) -> int:
        return self._launch.world_size

    @property
    def machines(self) -> LaunchedMachines:
        assert self._machines is not None  # tests run after `agree`
        return self._machines

    def agree(self) -> None:
        """Compare what the ranks have collected.

        Raises:
            pytest.UsageError: It differs.
        """
        here = _collected(self._session, self._launch)
        try:
            others = {rank: link.receive() for rank, link in self._launch.links.items()}
        except LinkLost as error:
            raise pytest.UsageError(f"{error} before any test ran") from error
        by_rank: dict[int, Collected] = {0: here, **others}
        difference = describe_difference(by_rank)
        self._machines = LaunchedMachines(self._launch, [by_rank[rank].place for rank in sorted(by_rank)])
        for rank, link in self._launch.links.items():
            link.send(Agreed(difference is None, self._machines.forks(rank)))
        if difference is not None:
            raise pytest.UsageError(difference)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self._num_started += 1

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        if not is_shared(item):
            return (yield)
        self._exit_if_any_ended()
        with _refused_rendezvous():
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Tell the other ranks."""
        report = yield
        if is_shared(item):
            verdict = _verdict(report, call)
            for link in self._launch.links.values():
                link.send(verdict)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failures[_name(report)] = ""  # shown as any

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Wait for the other ranks, and let the session fail where one of their tests has."""
        is_good = int(session.exitstatus) in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        deadline = None if is_good else time.monotonic() + _END_LIMIT_S
        for link in self._launch.links.values():
            link.send(SessionEnded("rank 0 has ended its session"))
        for rank, link in self._launch.links.items():
            self._wait_for_end(rank, link, deadline)
        if is_good and (self._lost or any(ended.failures for ended in self._ended.values())):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show what only other ranks know."""
        for rank, reason in self._lost.items():
            terminalreporter.section(f"rank {rank} of {self.world_size}", red=True)
            terminalreporter.line(reason)
        for rank, ended in self._ended.items():
            for name in sorted(ended.failures.keys() & self._failures.keys()):
                terminalreporter.line(f"rank {rank} of {self.world_size}: {name} failed there, too", red=True)
            for name in [name for name in ended.failures if name not in self._failures]:
                terminalreporter.section(f"rank {rank} of {self.world_size}: {name}", red=True)
                terminalreporter.line(ended.failures[name])

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        for link in self._launch.links.values():
            link.send(Finish(int(self._session.exitstatus)))
        _end_undisturbed()

    def _wait_for_end(self, rank: int, link: Link, deadline: float | None) -> None:
        while rank not in self._ended:
            try:
                message = link.receive(limit_s=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except LinkLost as error:
                self._lost[rank] = str(error)
                return
            except TimeoutError:
                self._lost[rank] = f"had not ended {_END_LIMIT_S:g} s after rank 0"
                return
            if isinstance(message, RankEnded):
                self._ended[rank] = message

    def _exit_if_any_ended(self) -> None:
        for rank, link in self._launch.links.items():
            link.poll()
            ended = next((message for message in link.received if isinstance(message, RankEnded)), None)
            if ended is not None:
                self._exit(f"rank {rank} has ended its session (exit status {ended.exitstatus})")
            if link.channel.ended:
                self._exit(str(LinkLost(rank)))

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> NoReturn:
        """End with a report, where the launcher ends all ranks because one has ended."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for link in self._launch.links.values():
            link.poll()
        lost = [rank for rank, link in self._launch.links.items() if link.channel.ended]
        who = f"the process of rank {lost[0]} has ended" if len(lost) == 1 else "a process of the launcher has ended"
        self._exit(f"SIGTERM: {who}, or the launcher was stopped")

    def _exit(self, reason: str) -> NoReturn:
        left = max(0, len(self._session.items) - self._num_started)
        pytest.exit(f"{reason}; {left} of {len(self._session.items)} tests did not start", returncode=1)


class OtherRank:
    """Goes through shared tests with rank 0, forks ranks for it, and reports what it reports."""

    def __init__(self, session: pytest.Session, launch: Launch, failures: dict[str, str]) -> None:
        self.forks = False
        self._session = session
        self._launch = launch
        self._failures = failures
        self._verdict: StageVerdict | None = None
        self._own_errors: set[tuple[str, str]] = set()

    def agree(self) -> None:
        """Tell rank 0 what this rank has collected.

        Raises:
            pytest.UsageError: Another rank has collected something else. Without a message: rank 0 has it.
        """
        config = self._session.config
        self._launch.links[0].send(_collected(self._session, self._launch))
        answer = self._receive()
        if not isinstance(answer, Agreed) or not answer.is_same:
            raise pytest.UsageError
        self.forks = answer.forks
        for item in filter(is_shared, self._session.items):
            item.fixturenames = []  # type: ignore[attr-defined]  # rank 0 evaluates them; autouse fixtures, too
            item._tpcheck_shared = True  # type: ignore[attr-defined]
            if config.pluginmanager.has_plugin("timeout"):
                item.add_marker(pytest.mark.timeout(0))  # this rank waits, for however long rank 0 takes
        junitxml.pytest_unconfigure(config)  # the file is rank 0's
        if hasattr(config, "cache"):
            config.cache.set = lambda *_: None  # type: ignore[method-assign]  # and so is this

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        if not _is_shared_here(item):
            return (yield)
        with contextlib.suppress(Exception, pytest.skip.Exception, pytest.fail.Exception, pytest.xfail.Exception):
            yield  # conditions of skips may differ here
        self._take_part(item, "setup")
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> object | None:
        if not _is_shared_here(pyfuncitem):
            return None
        self._take_part(pyfuncitem, "call")
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        if not _is_shared_here(item):
            return (yield)
        try:
            yield  # of fixtures that other tests have set up on this rank
        except Exception:
            self._own_errors.add((item.nodeid, "teardown"))
            raise
        self._take_part(item, "teardown")
        return None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Report what rank 0 reports."""
        if not _is_shared_here(item):
            return (yield)
        try:
            report = yield
        except Exception:  # an exception that has crossed processes may have lost what its representation shows
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", None, call.when)  # type: ignore[arg-type]  # not "collect"
        if self._verdict is None:  # the stage was interrupted, or has no function to call
            self._verdict = self._next_verdict(item, call.when)
        verdict, self._verdict = self._verdict, None
        if (item.nodeid, call.when) not in self._own_errors:
            report.outcome, report.longrepr = verdict.outcome, verdict.longrepr
            vars(report).pop("wasxfail", None)
            if verdict.wasxfail is not None:
                report.wasxfail = verdict.wasxfail
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        is_own = report.nodeid not in self._shared_nodeids or (report.nodeid, report.when) in self._own_errors
        if report.failed and is_own:
            captured = [f"--- {title} ---\n{content}" for title, content in report.sections]
            self._failures[_name(report)] = "\n".join([report.longreprtext, *captured])

    def pytest_internalerror(self, excrepr: object) -> None:
        self._failures["internal error"] = str(excrepr)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """End when rank 0 has reported, with its status: a launcher ends all ranks once one has failed."""
        self._launch.links[0].send(RankEnded(int(self._session.exitstatus), self._failures))
        with contextlib.suppress(LinkLost):
            while not isinstance(message := serve_worlds(self._launch), Finish):
                pass
            self._session.exitstatus = message.exitstatus
        _end_undisturbed()
        self._launch.close()

    @property
    def _shared_nodeids(self) -> set[str]:
        return {item.nodeid for item in self._session.items if _is_shared_here(item)}

    def _take_part(self, item: pytest.Item, when: Stage) -> None:
        """Wait for the verdict of rank 0 on this stage, forking ranks meanwhile; raise what was raised there."""
        self._verdict = None
        verdict = self._verdict = self._next_verdict(item, when)
        verdict.raise_exception()

    def _next_verdict(self, item: pytest.Item, when: str) -> StageVerdict:
        message = self._receive()
        if isinstance(message, StageVerdict) and (message.nodeid, message.when) == (item.nodeid, when):
            return message
        if isinstance(message, SessionEnded):
            pytest.exit(message.reason, returncode=1)
        pytest.exit(f"this rank is at {when} of {item.nodeid}, and rank 0 says {message!r:.200}", returncode=1)

    def _receive(self) -> Any:
        try:
            return serve_worlds(self._launch)
        except LinkLost as error:
            pytest.exit(str(error), returncode=1)


@contextlib.contextmanager
def _refused_rendezvous() -> Iterator[None]:
    """Refuse `init_process_group`: in a fixture of a shared test it would wait for ranks that do not evaluate it."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise UsageError(
            "init_process_group",
            "in a fixture",
            "a call on every rank; rank 0 alone evaluates the fixtures of tests that are marked tpcheck: let this one "
            'return where `request.node.get_closest_marker("tpcheck")` is not None',
        )

    rendezvous = import_module("torch.distributed.rendezvous")  # torch.distributed.rendezvous is also a function
    handlers: dict[str, Any] = getattr(rendezvous, "_rendezvous_handlers", {})  # a private name: without it it waits
    before = dict(handlers)
    handlers.update(dict.fromkeys(before, refuse))
    try:
        yield
    finally:
        handlers.update(before)


def _set_default_handler(handler: Any) -> None:
    """Handle SIGTERM, unless somebody else does."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, handler)


def _end_undisturbed() -> None:
    """Ignore SIGTERM: what remains takes less than a second, and torchrun sends it once another rank has exited."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _name(report: pytest.TestReport) -> str:
    return report.nodeid if report.when == "call" else f"{report.when} of {report.nodeid}"


def _is_shared_here(item: pytest.Item) -> bool:
    return getattr(item, "_tpcheck_shared", False)


def _collected(session: pytest.Session, launch: Launch) -> Collected:
    return Collected(tuple(item.nodeid for item in session.items), session.testsfailed, this_place(launch))


def describe_difference(by_rank: Mapping[int, Collected]) -> str | None:
    """Return how what the ranks have collected differs, None where it is the same."""
    expected = by_rank[0]
    for rank, actual in sorted(by_rank.items()):
        if actual.num_errors != expected.num_errors:
            return (
                f"rank {rank} has {actual.num_errors} errors of collection, and rank 0 has {expected.num_errors}: what "
                "rank 0 did not see is below"
            )
        if actual.nodeids != expected.nodeids:
            return _difference_of(rank, actual.nodeids, expected.nodeids)
    return None


def _difference_of(rank: int, actual: Sequence[str], expected: Sequence[str]) -> str:
    shared = min(len(actual), len(expected))
    first = next((index for index in range(shared) if actual[index] != expected[index]), shared)
    names = [nodeids[first] if first < len(nodeids) else "no test" for nodeids in (actual, expected)]
    advice = (
        "give all ranks one order: under pytest-randomly pass --randomly-seed=1 or -p no:randomly"
        if sorted(actual) == sorted(expected)
        else "give all ranks the same files and options, and parametrize nothing by rank"
    )
    return (
        f"ranks must collect the same tests in the same order. Rank {rank} has {len(actual)} and rank 0 "
        f"{len(expected)}; the first that differs is number {first + 1}: {names[0]} on rank {rank}, {names[1]} on "
        f"rank 0. Please {advice}. Or {_OTHER_WAY}."
    )


def _verdict(report: pytest.TestReport, call: pytest.CallInfo[None]) -> StageVerdict:
    longrepr: Any = report.longrepr
    if longrepr is not None and not isinstance(longrepr, tuple):
        longrepr = str(longrepr)
    return StageVerdict(
        nodeid=report.nodeid,
        when=call.when,  # type: ignore[arg-type]  # not "collect"
        outcome=report.outcome,
        longrepr=longrepr,
        wasxfail=getattr(report, "wasxfail", None),
        exception=None if call.excinfo is None else pickle_exception(call.excinfo.value),
    )
