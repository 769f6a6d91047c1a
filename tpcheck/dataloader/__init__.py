"""The hook around a data loader: every batch the same inside each TP group, and other samples on each replica."""

from tpcheck.dataloader.once import check_batch
from tpcheck.dataloader.watched import WatchedLoader, watch

__all__ = ["WatchedLoader", "check_batch", "watch"]
