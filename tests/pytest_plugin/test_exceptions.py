"""Exceptions keep their type and message when they are pickled, and get a traceback through the rank's lines."""

from __future__ import annotations

import threading
import traceback

import pytest

from tpcheck.pytest_plugin.messages import FrameLocation, pickle_exception, traceback_through, unpickle_exception


class TwoArguments(Exception):
    """Pickles, and does not unpickle: its constructor takes two arguments and its `args` contain one."""

    def __init__(self, first: object, second: object) -> None:
        super().__init__(f"{first} and {second}")
        self.second = second


@pytest.mark.parametrize("error", [ValueError("boom"), TwoArguments(1, 2), pytest.skip.Exception("no GPU")])
def test_an_exception_keeps_type_arguments_and_attributes(error: BaseException) -> None:
    restored = unpickle_exception(pickle_exception(error))
    assert type(restored) is type(error)
    assert restored.args == error.args
    assert vars(restored) == vars(error)


def test_what_does_not_pickle_becomes_text_or_is_dropped() -> None:
    error = ValueError("boom", threading.Lock())
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    restored = unpickle_exception(pickle_exception(error))
    assert isinstance(restored, ValueError)
    assert restored.args[0] == "boom"
    assert restored.args[1].startswith("<unlocked _thread.lock")
    assert not hasattr(restored, "lock")


@pytest.mark.parametrize("pickled", [b"", b"not a pickle", pickle_exception(ValueError())[:-5]])
def test_an_exception_that_does_not_load_is_none(pickled: bytes) -> None:
    assert unpickle_exception(pickled) is None


def test_a_traceback_goes_through_the_frames_outermost_first() -> None:
    frames = (FrameLocation("/home/me/test_x.py", 12, "test_x"), FrameLocation("/home/me/layers.py", 7, "forward"))
    shown = traceback.extract_tb(traceback_through(frames))
    assert [(entry.filename, entry.lineno, entry.name) for entry in shown] == [
        ("/home/me/test_x.py", 12, "test_x"),
        ("/home/me/layers.py", 7, "forward"),
    ]
    assert traceback_through(()) is None
