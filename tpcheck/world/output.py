"""What one rank writes to its descriptors, kept in files that have no name."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from typing import IO

_LONGEST = 1 << 20  # of a rank that never stops printing, the last part is enough
_ANNOUNCEMENT = re.compile(r"\[\.\.\. [\d.]+ MB before this\]")


class Output:
    """Three nameless files: stdout, stderr, and the stacks that faulthandler writes.

    Files, not pipes: a rank that prints much never waits for a reader, and what was written survives its writer.
    """

    def __init__(self, *, capture: bool) -> None:
        self._files: tuple[IO[bytes], ...] = tuple(
            tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
            for _ in range(3 if capture else 1)
        )
        self._capture = capture

    @property
    def descriptors(self) -> list[int]:
        """Return what a rank takes as stdout, stderr and stack file."""
        stacks, *captured = [file.fileno() for file in self._files]
        return [*(captured or _own_descriptors()), stacks]

    def restart(self) -> None:
        """Forget what was written: the next run begins."""
        for file in self._files:
            # The rank's descriptor is a copy of this one and shares its position.
            os.ftruncate(file.fileno(), 0)
            os.lseek(file.fileno(), 0, os.SEEK_SET)

    @property
    def stdout(self) -> str:
        return _tail(self._files[1]) if self._capture else ""

    @property
    def stderr(self) -> str:
        return _tail(self._files[2]) if self._capture else ""

    @property
    def stacks(self) -> str:
        return _tail(self._files[0])

    @property
    def stacks_size(self) -> int:
        return os.fstat(self._files[0].fileno()).st_size

    def close(self) -> None:
        for file in self._files:
            file.close()


def is_announcement(line: str) -> bool:
    """Tell whether this line says that what came before it was not kept."""
    return _ANNOUNCEMENT.fullmatch(line) is not None


def _own_descriptors() -> list[int]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # else the ranks' lines overtake those written before
    return [1, 2]


def _tail(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    if not size:
        return ""
    before = max(0, size - _LONGEST)
    text = os.pread(file.fileno(), _LONGEST, before).decode(errors="replace")
    return f"[... {math.ceil(before / 1e5) / 10} MB before this]\n{text}" if before else text
