"""The live groups are found where their library keeps them, in a fixed order."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tpcheck import Rank, RankFailure, Topology, UsageError, World, spawn
from tpcheck.backends.live_groups import ALONE, LiveGroups, groups_of_run


@pytest.fixture(scope="module")
def square() -> World:
    with spawn(Topology(tp=2, dp=2), timeout=120) as world:
        yield world


@pytest.fixture
def fresh() -> World:
    with spawn(Topology(tp=2, dp=2), timeout=120) as world:
        yield world


@pytest.fixture
def with_megatron() -> World:
    """Ranks would import Megatron anew, which takes each more than a second."""
    with spawn(Topology(tp=2, dp=2), timeout=120, also=["megatron.core.parallel_state"]) as world:
        yield world


EXPECTED = (((0, 1), (0, 2)), ((0, 1), (1, 3)), ((2, 3), (0, 2)), ((2, 3), (1, 3)))


def places(found: tuple[LiveGroups, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    return tuple((each.tp, each.dp) for each in found)


def test_a_topology_is_taken_as_it_is(square: World) -> None:
    from tpcheck.backends.live_groups import live_groups

    found = square.run(lambda rank: live_groups(topology=rank.topology))
    assert places(found) == EXPECTED
    assert {each.source for each in found} == {"topology"}
    assert found[3].topology == Topology(tp=2, dp=2)


def test_wrong_arguments_are_refused(square: World) -> None:
    from tpcheck.backends.live_groups import live_groups

    with pytest.raises(RankFailure, match=r"a tpcheck\.Topology of 4 ranks"):
        square.run(lambda rank: live_groups(topology=Topology(tp=2)))
    with pytest.raises(RankFailure, match=r"the TP group of rank"):
        square.run(lambda rank: live_groups(group=rank.group("dp"), topology=rank.topology))
    with pytest.raises(RankFailure, match=r"group='tp': expected a torch ProcessGroup"):
        square.run(lambda rank: live_groups(group="tp"))


def test_one_of_several_processes_is_not_alone_before_their_groups_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of them would say that there is nothing to compare, and write the same trace."""
    model = nn.Linear(1, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert groups_of_run(model, model, None).source == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="init_process_group first"):
        groups_of_run(model, model, None)
    assert groups_of_run(model, model, Topology()).source == ALONE  # as the caller says


def test_where_nobody_has_groups_it_says_what_to_give(fresh: World) -> None:
    from tpcheck.backends.live_groups import live_groups

    with pytest.raises(RankFailure, match=r"no framework has created one\. Pass group= or topology=tpcheck\.Topology"):
        fresh.run(lambda rank: live_groups())


def test_where_nobody_has_groups_all_ranks_are_taken_as_replicas(fresh: World) -> None:
    from tpcheck.backends.live_groups import groups_of_batches

    found = fresh.run(lambda rank: groups_of_batches())
    assert places(found) == tuple(((rank,), (0, 1, 2, 3)) for rank in range(4))
    assert "pass group= or topology=" in str(found[0].notice)


def run_without_groups(rank: Rank, shift: int) -> LiveGroups:
    """Ask for the groups of a run whose weights are equal on all ranks, or not."""
    import torch
    from torch import nn

    from tpcheck.backends.live_groups import groups_of_run

    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(shift * rank.rank)
        model.bias.fill_(0)
    return groups_of_run(model, model, None)


def test_ranks_of_a_run_that_hold_equal_weights_are_replicas_and_others_may_be_shards(fresh: World) -> None:
    assert places(fresh.run(run_without_groups, 0))[3] == ((3,), (0, 1, 2, 3))
    with pytest.raises(RankFailure, match="its weights differ between the ranks"):
        fresh.run(run_without_groups, 1)


def test_the_mesh_on_a_model_of_transformers(fresh: World) -> None:
    def find(rank: Rank) -> LiveGroups:
        from torch import nn
        from torch.distributed import init_device_mesh

        from tpcheck.backends.live_groups import live_groups

        engine = nn.Module()
        engine.module = nn.Linear(1, 1)
        engine.module._device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))  # type: ignore[assignment]
        return live_groups(model=engine)

    found = fresh.run(find)
    assert places(found) == EXPECTED
    assert found[0].source == "the device mesh on the model"
    assert found[0].dp_rank == 'model._device_mesh["fsdp"].get_local_rank()'
    assert found[0].notice is None


@pytest.mark.parametrize(
    ("names", "tp", "dp", "topology"),
    [
        (("pp", "dp", "cp", "tp"), (14, 15), (10, 14), Topology(tp=2, dp=2, cp=2, pp=2)),
        (("dp_replicate", "pp", "dp_shard", "tp"), (14, 15), (4, 6, 12, 14), Topology(tp=2, dp=4, pp=2)),
        (("pp", "dp_shard", "cp", "other"), (14,), (10, 14), Topology(dp=2, cp=2, pp=2)),
    ],
)
def test_a_mesh_has_its_groups_between_other_axes(
    names: tuple[str, ...], tp: tuple[int, ...], dp: tuple[int, ...], topology: Topology
) -> None:
    import torch

    from tpcheck.backends.live_groups import LiveGroups, _from_mesh

    class FourAxes:
        """Sixteen ranks, seen from rank 14."""

        mesh_dim_names, mesh, ndim = names, torch.arange(16).reshape(2, 2, 2, 2), 4

        def get_coordinate(self) -> list[int]:
            return [1, 1, 1, 0]

    groups = _from_mesh(FourAxes())
    assert groups is not None
    found = LiveGroups(14, groups.tp or (14,), groups.dp or (14,), "mesh", "", groups.cp or (), groups.pp or ())
    assert (found.tp, found.dp, found.topology) == (tp, dp, topology)


def test_stages_without_tp_are_no_replicas(fresh: World) -> None:
    def find(rank: Rank) -> LiveGroups:
        from torch import nn
        from torch.distributed import init_device_mesh

        from tpcheck.backends.live_groups import groups_of_batches

        model = nn.Linear(1, 1)
        model._device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))  # type: ignore[assignment]
        return groups_of_batches(model=model)

    found = fresh.run(find)
    assert places(found) == (((0,), (0, 1)), ((1,), (0, 1)), ((2,), (2, 3)), ((3,), (2, 3)))
    assert found[0].not_compared == "not compared across pp (ranks 0, 2)"


def test_the_groups_of_deepspeed(fresh: World) -> None:
    def find(rank: Rank) -> LiveGroups:
        import deepspeed
        from deepspeed.utils import groups

        from tpcheck.backends.live_groups import live_groups

        deepspeed.init_distributed("gloo")
        groups._init_tp_mesh_device(tensor_model_parallel_size=2)
        return live_groups()

    found = fresh.run(find)
    assert places(found) == EXPECTED
    assert found[0].source == "deepspeed.utils.groups"


def test_the_mesh_of_accelerate(fresh: World) -> None:
    def find(rank: Rank) -> LiveGroups:
        from accelerate.state import AcceleratorState
        from torch.distributed import init_device_mesh

        from tpcheck.backends.live_groups import live_groups

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        AcceleratorState._shared_state["device_mesh"] = mesh
        return live_groups()

    found = fresh.run(find)
    assert places(found) == EXPECTED
    assert found[0].source == "accelerate's device mesh"
    assert found[0].dp_rank == 'AcceleratorState().device_mesh["dp_shard"].get_local_rank()'


def test_a_group_alone_takes_its_replicas_from_the_library_that_has_them(fresh: World) -> None:
    def find(rank: Rank) -> LiveGroups:
        import deepspeed
        from deepspeed.utils import groups

        from tpcheck.backends.live_groups import live_groups

        deepspeed.init_distributed("gloo")
        groups._init_tp_mesh_device(tensor_model_parallel_size=2)
        return live_groups(group=rank.group("tp"))

    assert places(fresh.run(find)) == EXPECTED


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, EXPECTED),
        ({"context_parallel_size": 2}, (((0, 1), (0,)), ((0, 1), (1,)), ((2, 3), (2,)), ((2, 3), (3,)))),
        ({"order": "dp-cp-ep-pp-tp"}, (((0, 2), (0, 1)), ((1, 3), (0, 1)), ((0, 2), (2, 3)), ((1, 3), (2, 3)))),
    ],
)
def test_the_parallel_state_of_megatron(with_megatron: World, sizes: dict[str, Any], expected: Any) -> None:
    pytest.importorskip("megatron.core.parallel_state")

    def find(rank: Rank) -> LiveGroups:
        from megatron.core import parallel_state

        from tpcheck.backends.live_groups import live_groups

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, **sizes)
        return live_groups()

    found = with_megatron.run(find)
    assert places(found) == expected
    assert {each.source for each in found} == {"megatron.core.parallel_state"}
    assert found[0].topology.cp == sizes.get("context_parallel_size", 1)
