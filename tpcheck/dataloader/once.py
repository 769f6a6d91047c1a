"""One batch compared, once."""

from __future__ import annotations

from typing import Any

from tpcheck.records import Finding
from tpcheck.topology import Topology
from tpcheck.watching import Settings, find_peers
from tpcheck.watching.part import Part, Status
from tpcheck.watching.rounds import Coincidence, compare
from tpcheck.watching.watcher import TIMEOUT


def check_batch(
    batch: Any, *, group: Any = None, topology: Topology | None = None, timeout: float = TIMEOUT
) -> tuple[Finding, ...]:
    """Compare this rank's batch with those of its TP group and of the other replicas. Collective over both.

    Args:
        batch: Tensors and plain values in dicts, lists, tuples, dataclasses and objects.
        group: A TP group: a torch ProcessGroup, or a DeviceMesh of one dim.
        topology: Sizes of the axes. Where neither is given, the groups of transformers, DeepSpeed, accelerate or
            Megatron are used.
        timeout: Seconds that ranks wait for each other.

    Returns:
        What is wrong, the same on every rank; nothing is raised for it.

    Raises:
        UsageError: torch.distributed is not initialised, or there is no TP group to be found.
        RankFailure: A rank has gone.

    Example:
        >>> findings = tpcheck.check_batch(batch)  # doctest: +SKIP
    """
    chosen = Settings(group=group, topology=topology, timeout=timeout)
    peers = find_peers(group=group, topology=topology, timeout=chosen.timeout)
    part = Part(Status.BATCH, step=0, count=0, batch=batch, with_rows=len(peers.dp.ranks) > 1)
    return compare(peers, part, axes=frozenset({"tp", "dp"}), coincidence=Coincidence()).findings
