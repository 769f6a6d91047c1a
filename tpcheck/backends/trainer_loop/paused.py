"""A function that runs in a thread of its own, pauses in its middle, and goes on when `resume` is called."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack


class Stopped(BaseException):
    """Ends a paused function that is not to go on; no `except Exception` on its way holds it up."""


class PausedRun:
    """Runs `function` until it calls `pause`, and the rest when it is resumed. One thread runs at any time.

    A loop that prepares its model by itself is stopped so before its first step, while the caller looks at the model.
    Errors of the function are raised by `start` or `resume`. torch keeps modes, the number of threads and the device
    for each thread: those of the caller are active in the function, too.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._num_threads = torch.get_num_threads()
        has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._device = torch.cuda.current_device() if has_cuda else None
        self._may_run, self._has_stopped = threading.Event(), threading.Event()
        self._is_cancelled = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tpcheck-loop", daemon=True)

    def start(self) -> None:
        """Run the function until it pauses, or ends."""
        self._thread.start()
        self._wait()

    def resume(self) -> None:
        """Run the rest of the function."""
        self._may_run.set()
        self._wait()

    def pause(self) -> None:
        """Give the word to the caller until it resumes. Called by the function."""
        self._has_stopped.set()
        self._may_run.wait()
        if self._is_cancelled:
            raise Stopped

    def cancel(self) -> None:
        """End the function where it has paused; does nothing where it has ended."""
        if self._thread.is_alive():
            self._is_cancelled = True
            self._may_run.set()
            self._thread.join()

    def _wait(self) -> None:
        self._has_stopped.wait()
        self._has_stopped.clear()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        if self._device is not None:
            torch.cuda.set_device(self._device)
        try:
            with ExitStack() as stack:
                for mode in self._modes:
                    stack.enter_context(mode)
                self._function()
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._has_stopped.set()
