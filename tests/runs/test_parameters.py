"""Where parameters lie in whole ones, read off the shapes and digests of all ranks at the start."""

from __future__ import annotations

import torch

from tpcheck.core.placement import Shard
from tpcheck.numerics.sketch import GlobalIndex
from tpcheck.runs.recording.parameters import ParameterPlaces, StartOfRank, index_over_tp


def places_of(tp_rank: int, *digests: str, shape: tuple[int, ...] = (2, 3)) -> ParameterPlaces:
    return ParameterPlaces(tp_rank, tuple(StartOfRank("run", {"weight": (shape, digest)}) for digest in digests))


def test_a_partition_of_tensors_that_all_ranks_held_alike_lies_in_the_whole() -> None:
    in_shard = GlobalIndex.shard((4, 3), Shard(0), 2, 1)
    (place,) = places_of(1, "a", "a").places("weight", None, torch.zeros(2, 3), is_term=False, index_in_shard=in_shard)
    assert (place.label, place.shape, place.piece) == ("whole", (4, 3), in_shard.piece())


def test_a_partition_of_other_tensors_may_lie_in_any_cut() -> None:
    in_shard = GlobalIndex.shard((4, 3), Shard(0), 2, 1)
    places = places_of(1, "a", "b").places("weight", None, torch.zeros(2, 3), is_term=False, index_in_shard=in_shard)
    assert [(place.label, place.shape) for place in places] == [
        ("dim 0", (8, 3)),
        ("dim 1", (4, 6)),
        ("whole", (4, 3)),
    ]
    rows, columns, _ = (place.index for place in places)
    assert rows is not None
    assert columns is not None
    assert rows.indices[0].tolist() == [6, 7]
    assert [part.tolist() for part in columns.indices] == [[2, 3], [3, 4, 5]]


def test_a_fragment_keeps_its_place_in_the_shard_of_its_rank() -> None:
    in_shard = GlobalIndex((4,), (None,), fragment=(1, 3))
    index = index_over_tp(in_shard, 0, 2, 1)
    assert index.positions_of(*index.present).tolist() == [5, 6]
