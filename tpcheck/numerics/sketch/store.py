"""Where the numbers of sketches lie: rows of blocks of memory, one for each sketch."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from itertools import repeat
from threading import Lock

import torch

from tpcheck.numerics.sketch.signs import SIGN_SETS, TILES

NUM_SUMS = SIGN_SETS * TILES * TILES
_PACKED = NUM_SUMS + 2
_BLOCK_ROWS = 128  # 1 MiB


class _HostRows:
    """Rows for sketches on the CPU, in blocks of memory of their own, each free when none of its rows is in use.

    Sketches are made between activations and outlive them. In the heap of malloc each would keep apart the room that
    two activations leave, so that gradients do not fit there: a step of 126M parameters then has 100 MiB more.
    """

    def __init__(self) -> None:
        self._lock = Lock()  # backward hooks may run on a thread of their own
        self._unused: Iterator[tuple[torch.Tensor, int]] = iter(())

    def take(self) -> tuple[torch.Tensor, int]:
        """Return a block and the number of a row of it that is all 0 and was never used."""
        with self._lock:
            taken = next(self._unused, None)
            if taken is None:
                self._unused = zip(repeat(_new_block()), range(_BLOCK_ROWS), strict=False)
                taken = next(self._unused)
            return taken


_host_rows = _HostRows()


def _new_block() -> torch.Tensor:
    # By default forks would share it. Filled with pages at once, a row costs 5 us in place of 9.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    memory = mmap.mmap(-1, _BLOCK_ROWS * _PACKED * 8, flags=flags)
    with torch.inference_mode(False):  # a tensor that is made in inference mode cannot be written to after it
        return torch.frombuffer(memory, dtype=torch.float64).view(_BLOCK_ROWS, _PACKED)


def new_row(device: torch.device) -> tuple[torch.Tensor, int]:
    """Return a block and the number of a row of it for a new sketch: all 0."""
    if is_host(device):
        return _host_rows.take()
    # A device's allocator keeps small tensors apart, and orders what is freed by streams.
    return torch.zeros(1, _PACKED, dtype=torch.float64, device=device), 0


def is_host(device: torch.device) -> bool:
    """Return whether numbers may be looked at: on another device that waits until all before is done."""
    return device.type == "cpu"
