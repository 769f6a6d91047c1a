"""The ranks whose batches are compared with this rank's, and the connections to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from tpcheck.backends.live_groups import LiveGroups, live_groups
from tpcheck.core.errors import RankFailure
from tpcheck.core.topology import Topology
from tpcheck.world.exchange import Exchange

# Connections live as long as torch's default group: a loop may call `check_batch` at every step.
_peers: WeakKeyDictionary[Any, dict[Any, Peers]] = WeakKeyDictionary()
# A rank that hangs keeps its TP group waiting, and that group the other replicas: its own group is to report it first.
_EXTRA_TIMEOUT_ACROSS_DP = 3.0  # seconds


@dataclass(frozen=True, slots=True)
class Peers:
    """This rank's place and the connections to its peers.

    Attributes:
        groups: The ranks, and where the groups come from.
        tp, dp: Exchange with the ranks of the TP group, and with this rank's counterparts in the other replicas.
        replicas: TP group of each of those counterparts, in their order.
    """

    groups: LiveGroups
    tp: Exchange
    dp: Exchange
    replicas: tuple[tuple[int, ...], ...]

    def exchange(self, axis: str) -> Exchange:
        """Return the exchange over `tp` or `dp`."""
        return self.tp if axis == "tp" else self.dp

    def members(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Return the ranks behind each message of an exchange: one rank over `tp`, its TP group over `dp`."""
        return tuple((rank,) for rank in self.tp.ranks) if axis == "tp" else self.replicas

    def abort(self, failure: RankFailure) -> None:
        """Make every rank that waits for this one raise the failure."""
        self.tp.abort(failure)
        self.dp.abort(failure)


def find_peers(
    *, group: Any = None, topology: Topology | None = None, model: Any = None, timeout: float, shared: bool = True
) -> Peers:
    """Return the peers that `live_groups` finds. The first time, collective over them.

    Args:
        group, topology, model: As in `live_groups`.
        timeout: Seconds that ranks wait for each other.
        shared: Use connections that others use, too; a thread of its own must not.

    Raises:
        UsageError: There are none; see `live_groups`.
        RankFailure: One of them does not come.
    """
    from torch import distributed as dist

    groups = live_groups(group=group, topology=topology, model=model)
    cache = _peers.setdefault(dist.group.WORLD, {})
    key = (groups.tp, groups.dp, timeout)
    peers = cache.get(key) if shared else None
    if peers is None or peers.tp.broken or peers.dp.broken:
        tp = Exchange(groups.tp, axis="tp", timeout=timeout)
        dp = Exchange(groups.dp, axis="dp", timeout=timeout + _EXTRA_TIMEOUT_ACROSS_DP)
        tp.also_aborted_by, dp.also_aborted_by = (dp,), (tp,)
        peers = Peers(groups, tp, dp, dp.all_gather_object(groups.tp))
        if shared:
            cache[key] = peers
    return replace(peers, groups=groups)
