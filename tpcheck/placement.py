"""Documented import path of `tpcheck.core.placement`: how a tensor lies over the ranks of one mesh axis."""

from tpcheck.core.placement import Partial, Placement, Replicate, Shard

__all__ = [
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
]
