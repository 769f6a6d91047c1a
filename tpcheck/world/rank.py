"""One rank, as the function that runs on it sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from tpcheck.topology import Topology
from tpcheck.world.debugger import Prompt, set_trace
from tpcheck.world.groups import axis_group
from tpcheck.world.pickling import dumps, loads

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


class Rank:
    """This process's place in the world, and the ways to talk to the others.

    Attributes:
        rank: Global rank.
        topology: Sizes of the parallel axes.
    """

    def __init__(self, rank: int, topology: Topology, *, device: str, prompt: Prompt | None = None) -> None:
        self.rank = rank
        self.topology = topology
        self._device = device
        self._prompt = prompt or Prompt()
        # torch holds the groups. A reference here would keep gloo's threads past `destroy_process_group`, and a process
        # that exits with them aborts now and then ("terminate called without an active exception").
        self._groups: WeakValueDictionary[str, ProcessGroup] = WeakValueDictionary()

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def coordinate(self) -> dict[str, int]:
        """Position on each axis, outermost first."""
        return self.topology.coordinate(self.rank)

    @property
    def tp_rank(self) -> int:
        return self.coordinate["tp"]

    @property
    def dp_rank(self) -> int:
        return self.coordinate["dp"]

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self._device)

    def group(self, axis: str) -> ProcessGroup:
        """Return the process group of this rank's peers on `axis`; made at first use, which its members make together.

        Raises:
            UsageError: The topology has no such axis.
        """
        group = self._groups.get(axis)
        if group is None:
            group = self._groups[axis] = axis_group(self.topology, self.rank, axis)
        return group

    def gather(self, value: Any) -> tuple[Any, ...]:
        """Return every rank's value, by rank, on every rank. Collective over the world."""
        import torch

        if self.world_size == 1:
            return (value,)
        own = torch.frombuffer(bytearray(dumps(value)), dtype=torch.uint8)
        return tuple(loads(part.numpy().tobytes()) for part in _all_gather_uneven(own, self.world_size))

    def agree(self, finding: Any) -> Any:
        """Return the first finding that is not None, by rank; the same on every rank. Collective over the world.

        Ask this before raising: every rank then raises the same error, and none is left waiting in a collective.
        """
        return next((found for found in self.gather(finding) if found is not None), None)

    def breakpoint(self) -> None:
        """Stop here with pdb on the terminal; the other ranks and the world's deadline wait.

        Raises:
            UsageError: There is no terminal.
        """
        set_trace(self.rank, self._prompt)

    def __repr__(self) -> str:
        where = ", ".join(f"{axis}={index}" for axis, index in self.coordinate.items())
        return f"<Rank {self.rank} of {self.world_size}: {where}>"


def _all_gather_uneven(own: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    """Return every rank's bytes. CPU tensors: the default group carries them on every device."""
    import torch
    from torch import distributed as dist

    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([own.numel()]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: own.numel()] = own
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]
