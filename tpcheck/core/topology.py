"""The sizes of the parallel axes and their groups of ranks. Integers only; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tpcheck.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Topology:
    """How the ranks of a world are laid out over the parallel axes; `tp` is innermost.

    Example:
        >>> topology = Topology(tp=2, dp=2)
        >>> topology.groups("tp"), topology.groups("dp")
        (((0, 1), (2, 3)), ((0, 2), (1, 3)))
        >>> topology.coordinate(3)
        {'dp': 1, 'tp': 1}
    """

    tp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            _require_positive(axis, size)

    @classmethod
    def of(cls, *, world_size: int, tp: int = 1) -> Topology:
        """Return the topology of `world_size` ranks whose remaining factor is data-parallel.

        Raises:
            UsageError: `tp` does not divide `world_size`.
        """
        _require_positive("world_size", world_size)
        _require_positive("tp", tp)
        if world_size % tp:
            raise UsageError("tp", tp, f"a divisor of world_size={world_size}")
        return cls(tp=tp, dp=world_size // tp)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes, outermost first."""
        return {"dp": self.dp, "tp": self.tp}

    @property
    def world_size(self) -> int:
        return prod(self.sizes.values())

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the rank's position on each axis, outermost first."""
        self._require_rank(rank)
        position: dict[str, int] = {}
        for axis, size in reversed(self.sizes.items()):
            rank, position[axis] = divmod(rank, size)
        return dict(reversed(position.items()))

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Return every group of ranks that differ on `axis` alone, by first rank."""
        stride = self._stride(axis)
        size = self.sizes[axis]
        firsts = (rank for rank in range(self.world_size) if rank // stride % size == 0)
        return tuple(tuple(range(first, first + size * stride, stride)) for first in firsts)

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """Return the group of `axis` that has `rank`."""
        self._require_rank(rank)
        return next(group for group in self.groups(axis) if rank in group)

    def _stride(self, axis: str) -> int:
        axes = tuple(self.sizes)
        if axis not in axes:
            raise UsageError("axis", axis, axes)
        return prod(self.sizes[inner] for inner in axes[axes.index(axis) + 1 :])

    def _require_rank(self, rank: int) -> None:
        if not _is_int(rank) or not 0 <= rank < self.world_size:
            raise UsageError("rank", rank, f"an integer from 0 to {self.world_size - 1}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_positive(name: str, size: int) -> None:
    if not _is_int(size) or size < 1:
        raise UsageError(name, size, "a positive integer")
