"""Compares a checkpoint with a reference, to the bit."""

from tpcheck.verification.checkpoint.comparison import CHECK, Comparison, compare_checkpoints
from tpcheck.verification.checkpoint.opening import opened

__all__ = ["CHECK", "Comparison", "compare_checkpoints", "opened"]
