"""Documented import path of `tpcheck.watch_model`."""

from tpcheck.batches.model_hook import watch_model

__all__ = [
    "watch_model",
]
