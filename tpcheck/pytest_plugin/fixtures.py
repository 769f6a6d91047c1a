"""The fixtures `tp_rank` and `tp_spawn`, and which fixtures of others cannot follow a test to its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

import pytest

from tpcheck.errors import UsageError
from tpcheck.pytest_plugin.call import Caller
from tpcheck.pytest_plugin.marker import world_request
from tpcheck.pytest_plugin.options import options_of
from tpcheck.pytest_plugin.reference import imports_of
from tpcheck.pytest_plugin.settings import pickled_settings
from tpcheck.world import Rank, World

_OUTPUT = "it sees what pytest's process prints; what ranks print is captured, and shown when the test fails"
_PROCESS = "it changes pytest's process; make changes inside the body, as with `pytest.MonkeyPatch.context()`"
_SESSION = "it belongs to pytest's process, and the body runs in others"

# Some of these would pickle, and then quietly do nothing of use.
STAY_BEHIND: Mapping[str, str] = {
    **dict.fromkeys(("capfd", "capfdbinary", "caplog", "capsys", "capsysbinary", "capteesys"), _OUTPUT),
    **dict.fromkeys(("mocker", "monkeypatch"), _PROCESS),
    "recwarn": "it sees the warnings of pytest's process; use `pytest.warns` inside the body",
    **dict.fromkeys(
        (
            *("cache", "pytestconfig", "pytester", "record_property", "record_testsuite_property"),
            *("record_xml_attribute", "request", "subtests", "testdir", "tp_spawn"),
        ),
        _SESSION,
    ),
}

_OF_A_RANK = {"rank", "topology", *(name for name in dir(Rank) if not name.startswith("_"))}


class RankPlaceholder:
    """Stands for the rank in pytest's process, where there is none."""

    def __getattr__(self, name: str) -> NoReturn:
        if name not in _OF_A_RANK:
            raise AttributeError(name)  # what pickle, Hypothesis and others look for in any object
        raise UsageError(
            f"tp_rank.{name}",
            self,
            "use inside the body of a test marked `@pytest.mark.tpcheck(tp=2)`; fixtures run in pytest's own process",
        )

    def __reduce__(self) -> NoReturn:
        raise UsageError("tp_rank", self, "an argument of the test itself, not a part of another value")

    def __repr__(self) -> str:
        return "<tp_rank>"


@pytest.fixture(scope="session")  # Hypothesis takes offence at fixtures that are made once for all its examples
def tp_rank() -> RankPlaceholder:
    """This process's place in the world: `tpcheck.Rank`. The test is marked `@pytest.mark.tpcheck(tp=2)`."""
    return RankPlaceholder()


@pytest.fixture
def tp_spawn(request: pytest.FixtureRequest) -> Iterator[Callable[..., World]]:
    """Return a factory of worlds: `tp_spawn(tp=2, dp=1, timeout=60)`; they are closed when the test ends.

    It takes what the marker takes, and `env`, and is for tests that themselves run in pytest's process.
    """
    options = options_of(request.config)
    caller = Caller(pickled_settings(request.config), imports_of(request.node))
    with ExitStack() as worlds:

        def spawn_world(*, env: Mapping[str, str] | None = None, **arguments: Any) -> World:
            world = worlds.enter_context(world_request(arguments, options).open(env))
            world.run = partial(world.run, caller)  # type: ignore[method-assign]  # called as before
            return world

        yield spawn_world
