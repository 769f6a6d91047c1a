"""Real multi-process worlds: warm ranks, one default process group, every way to fail told apart.

Importing this package loads no torch: the controller needs none, ranks import it for themselves.
"""

from tpcheck.world.attach import attach
from tpcheck.world.rank import Rank
from tpcheck.world.world import World, spawn

__all__ = ["Rank", "World", "attach", "spawn"]
