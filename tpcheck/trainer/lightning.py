"""Documented import path of the callback for Lightning's Trainer."""

from tpcheck.batches.lightning import LightningCallback

__all__ = [
    "LightningCallback",
]
