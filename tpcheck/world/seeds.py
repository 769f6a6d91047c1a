"""Random generators of a rank: different on every rank unless told otherwise, and the same in every run."""

from __future__ import annotations

import random
import sys


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPUs)."""
    random.seed(seed)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(seed % 2**32)  # code under test draws from the global generator
    import torch

    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 2.4 ms at its first call in a process
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def seed_of_rank(rank: int) -> int:
    """Return a seed that no other rank has: with equal seeds, a broadcast that is missing goes unseen."""
    return 1_000_003 * (rank + 1)
