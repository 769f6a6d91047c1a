"""Compares the batches of all ranks while they train; what every hook around a data loader or a model is made of."""

from tpcheck.watching.part import Origin
from tpcheck.watching.peers import Peers, find_peers
from tpcheck.watching.settings import OnMismatch, Settings, chosen_settings
from tpcheck.watching.watcher import Watcher

__all__ = ["OnMismatch", "Origin", "Peers", "Settings", "Watcher", "chosen_settings", "find_peers"]
