"""How much memory is free on this machine."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 1024**3


def free_memory() -> int:
    """Return the bytes that new processes can have; of the page cache what can be dropped is free."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError):
        pass  # not Linux
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
