"""A function in a thread that pauses, goes on, fails, or is ended; one thread runs at any time."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tpcheck.backends.trainer_loop.paused import PausedRun


def test_it_pauses_in_its_middle_and_goes_on() -> None:
    events: list[str] = []

    def function() -> None:
        events.append("begins")
        run.pause()
        events.append("ends")

    run = PausedRun(function)
    run.start()
    assert events == ["begins"]
    run.resume()
    assert events == ["begins", "ends"]


@pytest.mark.parametrize("pauses", [False, True])
def test_an_error_is_raised_where_the_caller_waits(pauses: bool) -> None:
    def function() -> None:
        if pauses:
            run.pause()
        raise LookupError("none")

    run = PausedRun(function)
    if pauses:
        run.start()
    with pytest.raises(LookupError, match="none"):
        (run.resume if pauses else run.start)()


def test_what_has_paused_can_be_ended_and_cleans_up() -> None:
    events: list[str] = []

    def function() -> None:
        try:
            run.pause()
            events.append("never")
        finally:
            events.append("cleaned up")

    run = PausedRun(function)
    run.start()
    run.cancel()
    run.cancel()
    assert events == ["cleaned up"]


def test_the_callers_modes_are_active_in_it() -> None:
    class Halving(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return torch.full((), 0.5) if func is torch.ones_like else func(*args, **(kwargs or {}))

    seen: list[float] = []
    with Halving():
        run = PausedRun(lambda: seen.append(float(torch.ones_like(torch.zeros(())))))
        run.start()
        assert float(torch.ones_like(torch.zeros(()))) == 0.5
    assert seen == [0.5]
