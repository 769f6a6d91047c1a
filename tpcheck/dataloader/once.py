"""One batch compared, once."""

from __future__ import annotations

from typing import Any

from tpcheck.records import Finding
from tpcheck.topology import Topology
from tpcheck.watching import chosen_settings, find_peers
from tpcheck.watching.part import Part, Status
from tpcheck.watching.rounds import Coincidence, compare


def check_batch(
    batch: Any, *, group: Any = None, topology: Topology | None = None, timeout: float | None = None
) -> tuple[Finding, ...]:
    """Compare this rank's batch with those of its TP group and of the other replicas. Collective over both.

    Args:
        batch: Tensors and plain values in dicts, lists, tuples, dataclasses and objects.
        group: A TP group: a torch ProcessGroup, or a DeviceMesh of one dim.
        topology: Sizes of the axes. Where neither is given, the groups of transformers, DeepSpeed, accelerate or
            Megatron are used.
        timeout: Seconds that ranks wait for each other; where it is not given, as for `tpcheck.watch`.

    Returns:
        What is wrong, the same on every rank; nothing is raised for it. Nothing where `TPCHECK=0`: no batch is looked
        at. What replicas have in common is left out where `[tool.tpcheck]` has `across_dp = "ignore"`.

    Raises:
        UsageError: torch.distributed is not initialised, or there is no TP group to be found.
        RankFailure: A rank has gone.

    Example:
        >>> findings = tpcheck.check_batch(batch)  # doctest: +SKIP
    """
    chosen = chosen_settings(group=group, topology=topology, timeout=timeout)
    if chosen is None:
        return ()
    peers = find_peers(group=group, topology=topology, timeout=chosen.timeout)
    coincidence = None if chosen.across_dp == "ignore" else Coincidence()
    with_rows = len(peers.dp.ranks) > 1 and coincidence is not None
    part = Part(Status.BATCH, step=0, count=0, batch=batch, with_rows=with_rows)
    return compare(peers, part, axes=frozenset({"tp", "dp"}), coincidence=coincidence).findings
