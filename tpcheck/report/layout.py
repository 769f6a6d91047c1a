"""A topology as text: who sits where, which groups exist."""

from __future__ import annotations

from collections.abc import Iterator

from tpcheck.report.lines import Line, labelled, plain
from tpcheck.topology import Topology


def topology_lines(topology: Topology) -> Iterator[Line]:
    """Yield every rank's place and every axis's groups."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in topology.sizes.items())
    yield plain(f"world {topology.world_size}: {sizes} (the last axis is innermost)", "bold")
    yield Line()
    axes = tuple(topology.sizes)
    yield plain("  rank  " + "  ".join(f"{axis:>4}" for axis in axes), "dim")
    for rank in range(topology.world_size):
        place = topology.coordinate(rank)
        yield plain(f"  {rank:>4}  " + "  ".join(f"{place[axis]:>4}" for axis in axes))
    yield Line()
    for axis in reversed(axes):
        groups = (f"({', '.join(map(str, group))})" for group in topology.groups(axis))
        yield from labelled(f"{axis} groups", " ".join(groups))
