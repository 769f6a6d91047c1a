"""How a rank's parameters lie in the whole ones, where no backend knows: read off all ranks' shapes at the start."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tpcheck.core.placement import Shard
from tpcheck.numerics.sketch import GlobalIndex
from tpcheck.runs.recording.activations import Place


@dataclass(frozen=True, slots=True)
class StartOfRank:
    """What one rank tells the others of its TP group when a recording begins.

    Attributes:
        run: Names the recording; rank 0's counts.
        parameters: Local shape and digest of each parameter.
    """

    run: str
    parameters: Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, slots=True)
class ParameterPlaces:
    """Finds the places of tensors that have the shape of a parameter.

    Attributes:
        tp_rank: Of this rank.
        ranks: What each rank of the TP group said at the start, by tp_rank.
    """

    tp_rank: int
    ranks: tuple[StartOfRank, ...]

    def places(
        self,
        name: str,
        index: GlobalIndex | None,
        values: torch.Tensor,
        *,
        is_term: bool,
        index_in_shard: GlobalIndex | None = None,
    ) -> tuple[Place, ...]:
        """Return the place of a part; where its layout is unknown, every cut of one dim that the shapes allow.

        Parts that were equal on all ranks at the start are replicas.
        """
        if index is not None:
            return (Place("layout", index.shape, index.piece(), index, is_term=is_term),)
        if index_in_shard is not None:
            return self._places_of_partition(name, index_in_shard)
        local = tuple(values.shape)
        of_ranks = [rank.parameters.get(name) for rank in self.ranks]
        known = [each for each in of_ranks if each is not None]
        if len(known) < len(of_ranks) or known[self.tp_rank][0] != local or len(set(known)) == 1:
            return (self._place("whole", GlobalIndex.whole(local)),)
        shapes = [shape for shape, _ in known]
        places = []
        for dim in range(len(local)):
            if {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes} != {(*local[:dim], *local[dim + 1 :])}:
                continue
            sizes = tuple(shape[dim] for shape in shapes)
            whole = (*local[:dim], sum(sizes), *local[dim + 1 :])
            index = GlobalIndex.shard(whole, Shard(dim, sizes=(sizes,)), len(shapes), self.tp_rank)
            places.append(self._place(f"dim {dim}", index))
        if len(set(shapes)) == 1:  # replicas that differ already
            places.append(self._place("whole", GlobalIndex.whole(local)))
        return tuple(places)

    def _places_of_partition(self, name: str, in_shard: GlobalIndex) -> tuple[Place, ...]:
        """Return the places of a part of this TP rank's tensor that is partitioned over DP (FSDP2, ZeRO)."""
        whole = self._place("whole", in_shard)
        of_ranks = [rank.parameters.get(name) for rank in self.ranks]
        if None in of_ranks or len(set(of_ranks)) == 1:
            return (whole,)
        cuts = [
            self._place(f"dim {dim}", index_over_tp(in_shard, dim, len(self.ranks), self.tp_rank))
            for dim in range(len(in_shard.shape))
        ]
        return (*cuts, whole)

    @staticmethod
    def _place(label: str, index: GlobalIndex) -> Place:
        return Place(label, index.shape, index.piece(), index)


def index_over_tp(in_shard: GlobalIndex, dim: int, tp: int, tp_rank: int) -> GlobalIndex:
    """Return where elements of a TP rank's tensor are in the whole one, of which each rank has as much of `dim`."""
    size = in_shard.shape[dim]
    shape = (*in_shard.shape[:dim], tp * size, *in_shard.shape[dim + 1 :])
    local = in_shard.indices[dim]
    indices = list(in_shard.indices)
    indices[dim] = tp_rank * size + (torch.arange(size, device="cpu") if local is None else local)
    return GlobalIndex(shape, tuple(indices), fragment=in_shard.fragment)


def exchange_starts(
    mine: StartOfRank, rank: int, tp_group: Sequence[int], cp_group: Sequence[int] = ()
) -> tuple[tuple[StartOfRank, ...], tuple[int, ...]]:
    """Return what every rank of the TP group says, by tp_rank, and the ranks of the TP groups of all CP peers.

    Through the store of the default process group: every rank of the world calls this when it starts to record. A store
    needs no collective, on no device.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return (mine,), (rank,)
    store = dist.distributed_c10d._get_default_store()
    number = store.add(f"tpcheck/record/count/{rank}", 1)
    prefix = f"tpcheck/record/{number}"
    parameters = {name: list(each) for name, each in mine.parameters.items()}
    store.set(f"{prefix}/{rank}", json.dumps([mine.run, parameters, list(tp_group)]))
    run = json.loads(store.get(f"{prefix}/0"))[0]
    starts = []
    for other in tp_group:
        parameters = json.loads(store.get(f"{prefix}/{other}"))[1]
        starts.append(StartOfRank(run, {name: (tuple(shape), bits) for name, (shape, bits) in parameters.items()}))
    together = {*tp_group}
    for peer in cp_group:
        together.update(json.loads(store.get(f"{prefix}/{peer}"))[2])
    return tuple(starts), tuple(sorted(together))
