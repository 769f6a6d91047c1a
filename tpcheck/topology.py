"""Documented import path of `tpcheck.core.topology`: the sizes of the parallel axes and which ranks form a group."""

from tpcheck.core.topology import Topology

__all__ = [
    "Topology",
]
