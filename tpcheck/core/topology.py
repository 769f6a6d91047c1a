"""The sizes of the parallel axes and their groups of ranks. Integers only; no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from tpcheck.core.errors import UsageError


@dataclass(frozen=True, slots=True, repr=False)
class Topology:
    """How the ranks of a world are laid out over the parallel axes; `tp` is innermost, then `cp`, `dp` and `pp`.

    That is the order of Megatron and of the device meshes of torchtitan and accelerate. `ep` is no axis beside the
    others: the experts of a layer are dealt over consecutive ranks of `dp` and `cp` together, as both do.

    Attributes:
        tp: Ranks that share the weights of each layer.
        dp: Replicas of the model.
        cp: Ranks that share a sequence.
        pp: Stages of layers.
        ep: Ranks that share the experts of a layer; a divisor of dp * cp.

    Example:
        >>> topology = Topology(tp=2, dp=2)
        >>> topology.groups("tp"), topology.groups("dp")
        (((0, 1), (2, 3)), ((0, 2), (1, 3)))
        >>> topology.coordinate(3)
        {'dp': 1, 'tp': 1}
        >>> Topology(tp=2, dp=2, pp=2).groups("pp")
        ((0, 4), (1, 5), (2, 6), (3, 7))
    """

    tp: int = 1
    dp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            _require_positive(axis, getattr(self, axis))
        if self.dp * self.cp % self.ep:
            raise UsageError("ep", self.ep, f"a divisor of dp * cp = {self.dp * self.cp}")

    @classmethod
    def of(cls, *, world_size: int, tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1) -> Topology:
        """Return the topology of `world_size` ranks whose remaining factor is data-parallel.

        Raises:
            UsageError: The other axes do not divide `world_size`.
        """
        _require_positive("world_size", world_size)
        rest = world_size
        for name, size in (("tp", tp), ("cp", cp), ("pp", pp)):
            _require_positive(name, size)
            if rest % size:
                raise UsageError(name, size, f"a divisor of world_size={world_size}{_already(world_size // rest)}")
            rest //= size
        return cls(tp=tp, dp=rest, cp=cp, pp=pp, ep=ep)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes, outermost first: those of `dp` and `tp`, and of others above 1. Their product is the world."""
        sizes = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}
        return {axis: size for axis, size in sizes.items() if size > 1 or axis in ("dp", "tp")}

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that have groups: those of `sizes`, and `ep` where experts are dealt."""
        return (*self.sizes, *(("ep",) if self.ep > 1 else ()))

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of tp, dp, cp and pp."""
        return prod(self.sizes.values())

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the rank's position on each axis, outermost first."""
        self._require_rank(rank)
        return {axis: rank // stride % getattr(self, axis) for axis, stride in self._strides().items()}

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Return every group of ranks that differ on `axis` alone, by first rank."""
        stride, size = self._stride_and_size(axis)
        firsts = (rank for rank in range(self.world_size) if rank // stride % size == 0)
        return tuple(tuple(range(first, first + size * stride, stride)) for first in firsts)

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """Return the group of `axis` that has `rank`."""
        self._require_rank(rank)
        stride, size = self._stride_and_size(axis)
        first = rank - rank // stride % size * stride
        return tuple(range(first, first + size * stride, stride))

    def __repr__(self) -> str:
        sizes = (f"{axis}={getattr(self, axis)}" for axis in AXES if axis in self.axes)
        return f"{type(self).__name__}({', '.join(sizes)})"

    def _strides(self) -> dict[str, int]:
        """Return by how much the ranks of neighbours on each axis differ, outermost first."""
        strides, stride = {"ep": self.tp} if self.ep > 1 else {}, 1
        for axis, size in reversed(self.sizes.items()):
            strides[axis] = stride
            stride *= size
        return dict(reversed(strides.items()))

    def _stride_and_size(self, axis: str) -> tuple[int, int]:
        strides = self._strides()
        if axis not in strides:
            raise UsageError("axis", axis, self.axes)
        return strides[axis], getattr(self, axis)

    def _require_rank(self, rank: int) -> None:
        if not _is_int(rank) or not 0 <= rank < self.world_size:
            raise UsageError("rank", rank, f"an integer from 0 to {self.world_size - 1}")


AXES = tuple(field.name for field in fields(Topology))


def _already(product: int) -> str:
    return f" over {product} ranks of other axes" if product > 1 else ""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_positive(name: str, size: int) -> None:
    if not _is_int(size) or size < 1:
        raise UsageError(name, size, "a positive integer")
