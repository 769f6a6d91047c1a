"""Compares a checkpoint with a reference, to the bit."""

from tpcheck.verification.checkpoint.comparison import Comparison, compare_checkpoints
from tpcheck.verification.checkpoint.opening import opened

__all__ = ["Comparison", "compare_checkpoints", "opened"]
