"""Worlds of real processes: ranks forked from a forkserver, with one default process group, and how they fail.

Importing this package does not import torch: only ranks need it.
"""

from tpcheck.world.attach import attach
from tpcheck.world.rank import Rank
from tpcheck.world.world import World, spawn

__all__ = ["Rank", "World", "attach", "spawn"]
