"""Documented import path of the callback for transformers' Trainer."""

from tpcheck.batches.model_hook import TpcheckCallback

__all__ = [
    "TpcheckCallback",
]
