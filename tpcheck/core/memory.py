"""How much memory is free on this machine."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]

GIB = 1024**3


def free_memory() -> int:
    """Return the bytes that new processes can have; of the page cache what can be dropped is free."""
    return int(psutil.virtual_memory().available)
