"""Compares the batches of all ranks while they train; what every hook around a data loader or a model is made of."""

from tpcheck.watching.part import Origin
from tpcheck.watching.peers import Peers, find_peers
from tpcheck.watching.watcher import Settings, Watcher

__all__ = ["Origin", "Peers", "Settings", "Watcher", "find_peers"]
