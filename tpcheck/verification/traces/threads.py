"""How many threads the arithmetic on a small model's tensors takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALL = 20_000_000  # parameters: below it, threads that wait for one another cost more than they save


@contextmanager
def few_threads(num_parameters: int) -> Iterator[None]:
    """Compute on one thread inside, for a small model."""
    before = torch.get_num_threads()
    if num_parameters < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
