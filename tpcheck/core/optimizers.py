"""Which optimizers compute a step from a whole matrix."""

from __future__ import annotations

OPTIMIZERS_OF_WHOLE_MATRICES = ("muon", "adafactor", "lamb", "shampoo", "soap", "came", "lars")
"""Optimizers whose step on an element depends on the whole matrix: on a shard they compute something else."""


def needs_whole_matrices(name: str) -> bool:
    """Return whether the name is that of such an optimizer.

    Example:
        >>> needs_whole_matrices("OneBitLamb"), needs_whole_matrices("AdamW")
        (True, False)
    """
    return any(known in name.lower() for known in OPTIMIZERS_OF_WHOLE_MATRICES)
