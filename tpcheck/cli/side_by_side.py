"""Runs one thing after another, or some side by side."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def side_by_side(works: Sequence[Callable[[], Result]], jobs: int) -> Iterator[Result]:
    """Yield results as they are reached, with at most `jobs` at a time. None of the works raises."""
    if min(jobs, len(works)) <= 1:  # in this thread, so that an interrupt reaches the world that runs
        yield from (work() for work in works)
        return
    waiting: queue.SimpleQueue[Callable[[], Result]] = queue.SimpleQueue()
    done: queue.SimpleQueue[Result] = queue.SimpleQueue()
    for work in works:
        waiting.put(work)

    def labour() -> None:
        while True:
            try:
                work = waiting.get_nowait()
            except queue.Empty:
                return
            done.put(work())

    for _ in range(min(jobs, len(works))):  # daemons: after an interrupt nothing waits for them
        threading.Thread(target=labour, daemon=True).start()
    for _ in works:
        yield done.get()
