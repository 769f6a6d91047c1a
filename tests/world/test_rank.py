"""A `Rank` knows its coordinates and communicates with its peers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpcheck import Rank, RankFailure, Topology, World, spawn


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with spawn(Topology(tp=2, dp=2)) as world:
        yield world


def test_ranks_know_their_coordinates_and_device(world: World) -> None:
    coordinates = world.run(lambda rank: (rank.rank, rank.tp_rank, rank.dp_rank, rank.world_size, str(rank.device)))
    assert coordinates == ((0, 0, 0, 4, "cpu"), (1, 1, 0, 4, "cpu"), (2, 0, 1, 4, "cpu"), (3, 1, 1, 4, "cpu"))


def test_a_group_contains_the_peers_of_its_axis(world: World) -> None:
    def members(rank: Rank) -> tuple[list[int], list[int]]:
        from torch import distributed as dist

        return dist.get_process_group_ranks(rank.group("tp")), dist.get_process_group_ranks(rank.group("dp"))

    assert world.run(members) == (([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3]))


def test_a_group_is_created_once(world: World) -> None:
    assert world.run(lambda rank: rank.group("tp") is rank.group("tp")) == (True,) * 4


def test_creating_a_group_is_collective_over_its_members_alone() -> None:
    def reduce_in_first_group(rank: Rank) -> int:
        import torch

        number = torch.ones((), dtype=torch.int64)
        if rank.dp_rank == 0:
            torch.distributed.all_reduce(number, group=rank.group("tp"))
        return int(number)

    with spawn(Topology(tp=2, dp=2), timeout=20) as world:
        assert world.run(reduce_in_first_group) == (2, 2, 1, 1)


def test_the_group_of_an_axis_that_spans_the_world_is_the_default_group() -> None:
    def is_world(rank: Rank) -> bool:
        from torch import distributed as dist

        return rank.group("tp") is dist.group.WORLD

    with spawn(Topology(tp=2)) as world:
        assert world.run(is_world) == (True, True)


def test_an_unknown_axis_is_refused(world: World) -> None:
    with pytest.raises(RankFailure, match="axis='pp': expected one of dp, tp"):
        world.run(lambda rank: rank.group("pp"))


def test_gather_returns_every_value_on_every_rank(world: World) -> None:
    values = world.run(lambda rank: rank.gather({"rank": rank.rank, "text": "x" * 1000 * rank.rank}))
    assert [value["rank"] for value in values[3]] == [0, 1, 2, 3]
    assert len(values[0][3]["text"]) == 3000
    assert len(set(map(str, values))) == 1


def test_gather_takes_functions_that_only_cloudpickle_can_pickle(world: World) -> None:
    def gather_functions(rank: Rank) -> list[int]:
        number = rank.rank
        return [fn() for fn in rank.gather(lambda: number)]

    assert world.run(gather_functions) == ([0, 1, 2, 3],) * 4


def test_ranks_agree_on_the_first_finding(world: World) -> None:
    assert world.run(lambda rank: rank.agree(f"on {rank.rank}" if rank.rank >= 2 else None)) == ("on 2",) * 4
    assert world.run(lambda rank: rank.agree(None)) == (None,) * 4


def test_a_world_of_one_rank_works() -> None:
    with spawn(Topology()) as world:
        assert world.run(lambda rank: (rank.gather(1), rank.agree("it"), rank.group("tp").size())) == (((1,), "it", 1),)
