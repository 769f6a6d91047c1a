"""Lines that a hook writes beside a training, to stderr, on one rank."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Write a line; nothing where the process has no stderr."""
    if sys.stderr is not None:
        sys.stderr.write(f"tpcheck: {text}\n")
        sys.stderr.flush()


class Notice:
    """A line that a process writes once, whoever has it to say."""

    def __init__(self) -> None:
        self._is_said = False

    def say(self, text: str) -> None:
        if not self._is_said:
            self._is_said = True
            say(text)


# That there is no TP, which each hook of a script finds.
NO_TP = Notice()
