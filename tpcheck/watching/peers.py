"""The ranks whose batches are compared, and the connections between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from tpcheck.adapters.live_groups import LiveGroups, live_groups
from tpcheck.topology import Topology
from tpcheck.world.exchange import Exchange

# Connections are made once for as long as torch's default group lives: a loop may call `check_batch` at every step.
_peers: WeakKeyDictionary[Any, dict[Any, Peers]] = WeakKeyDictionary()
# A rank that hangs keeps its TP group waiting, and that another replica: its own group is to tell first.
_LONGER = 3.0  # seconds


@dataclass(frozen=True, slots=True)
class Peers:
    """This rank's place and the ways to its peers.

    Attributes:
        groups: Who they are, and who told.
        tp, dp: Exchange with the ranks of the TP group, and with this rank's counterparts in the other replicas.
        replicas: TP group of each of those counterparts, in their order.
    """

    groups: LiveGroups
    tp: Exchange
    dp: Exchange
    replicas: tuple[tuple[int, ...], ...]

    def alarm(self, failure: Any) -> None:
        """Tell everybody who waits for this rank that it will not come."""
        self.tp.alarm(failure)
        self.dp.alarm(failure)


def find_peers(
    *, group: Any = None, topology: Topology | None = None, model: Any = None, timeout: float, shared: bool = True
) -> Peers:
    """Return the peers that `live_groups` finds. The first time, collective over them.

    Args:
        timeout: Seconds that ranks wait for each other.
        shared: Use the connections of others; what compares in a thread of its own must not.

    Raises:
        UsageError: There are none; see `live_groups`.
        RankFailure: One of them does not come.
    """
    from torch import distributed as dist

    groups = live_groups(group=group, topology=topology, model=model)
    known = _peers.setdefault(dist.group.WORLD, {})
    key = (groups.tp, groups.dp, timeout)
    kept = known.get(key) if shared else None
    if kept is None or kept.tp.broken or kept.dp.broken:
        tp = Exchange(groups.tp, axis="tp", timeout=timeout)
        dp = Exchange(groups.dp, axis="dp", timeout=timeout + _LONGER)
        tp.beside, dp.beside = (dp,), (tp,)
        kept = Peers(groups, tp, dp, dp.gather(groups.tp))
        if shared:
            known[key] = kept
    return replace(kept, groups=groups)
