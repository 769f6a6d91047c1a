"""A topology says which ranks belong together."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck import Topology, UsageError

SIZES = st.integers(1, 12)
SMALL = st.integers(1, 4)
TOPOLOGIES = st.builds(Topology, tp=SIZES, dp=SIZES) | st.builds(Topology, tp=SMALL, dp=SMALL, cp=SMALL, pp=SMALL)
AXES = st.sampled_from(["tp", "dp"])


def test_tp_is_innermost() -> None:
    topology = Topology(tp=2, dp=2)
    assert topology.groups("tp") == ((0, 1), (2, 3))
    assert topology.groups("dp") == ((0, 2), (1, 3))
    assert topology.coordinate(3) == {"dp": 1, "tp": 1}
    assert topology.peers(rank=3, axis="tp") == (2, 3)


@given(TOPOLOGIES, AXES)
def test_every_rank_is_in_exactly_one_group_of_each_axis(topology: Topology, axis: str) -> None:
    assert sorted(chain.from_iterable(topology.groups(axis))) == list(range(topology.world_size))


@given(TOPOLOGIES, AXES)
def test_the_ranks_of_a_group_differ_on_its_axis_alone(topology: Topology, axis: str) -> None:
    for group in topology.groups(axis):
        places = [topology.coordinate(rank) for rank in group]
        assert [place.pop(axis) for place in places] == list(range(topology.sizes[axis]))
        assert all(place == places[0] for place in places)


@given(TOPOLOGIES)
def test_coordinates_are_all_different_and_within_the_sizes(topology: Topology) -> None:
    places = [tuple(topology.coordinate(rank).items()) for rank in range(topology.world_size)]
    assert len(set(places)) == topology.world_size
    assert all(0 <= index < topology.sizes[axis] for place in places for axis, index in place)


@given(TOPOLOGIES, AXES, st.data())
def test_peers_are_the_group_that_the_rank_is_in(topology: Topology, axis: str, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, topology.world_size - 1))
    assert rank in topology.peers(rank, axis)
    assert topology.peers(rank, axis) in topology.groups(axis)


@given(tp=SIZES, dp=SIZES)
def test_a_world_size_gives_the_remaining_factor_to_dp(tp: int, dp: int) -> None:
    assert Topology.of(world_size=tp * dp, tp=tp) == Topology(tp=tp, dp=dp)
    assert Topology.of(world_size=tp * dp * 6, tp=tp, cp=2, pp=3) == Topology(tp=tp, dp=dp, cp=2, pp=3)


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_tp_size_that_does_not_divide_the_world_raises_a_usage_error(world_size: int, tp: int) -> None:
    if world_size % tp:
        with pytest.raises(UsageError) as error:
            Topology.of(world_size=world_size, tp=tp)
        assert (error.value.name, error.value.value) == ("tp", tp)
        assert error.value.accepted == f"a divisor of world_size={world_size}"
    else:
        assert Topology.of(world_size=world_size, tp=tp).world_size == world_size


@pytest.mark.parametrize("size", [0, -1, True, 1.0, "2", None])
@pytest.mark.parametrize("axis", ["tp", "dp"])
def test_a_size_is_a_positive_integer(axis: str, size: object) -> None:
    with pytest.raises(UsageError) as error:
        Topology(**{axis: size})  # type: ignore[arg-type]
    assert str(error.value) == f"{axis}={size!r}: expected a positive integer"


@pytest.mark.parametrize("rank", [-1, 4, True, 0.0, "0"])
def test_a_rank_is_one_of_the_world(rank: object) -> None:
    with pytest.raises(UsageError) as error:
        Topology(tp=2, dp=2).coordinate(rank)  # type: ignore[arg-type]
    assert str(error.value) == f"rank={rank!r}: expected an integer from 0 to 3"
    with pytest.raises(UsageError):
        Topology(tp=2, dp=2).peers(rank, "tp")  # type: ignore[arg-type]


def test_an_axis_of_size_1_beside_dp_and_tp_has_no_groups() -> None:
    with pytest.raises(UsageError) as error:
        Topology(tp=2).groups("pp")
    assert str(error.value) == "axis='pp': expected one of dp, tp"
    assert Topology(tp=2, pp=2).axes == ("pp", "dp", "tp")


def test_further_axes_lie_in_the_order_of_megatron_and_of_device_meshes() -> None:
    topology = Topology(tp=2, cp=2, dp=2, pp=2)
    assert topology.coordinate(13) == {"pp": 1, "dp": 1, "cp": 0, "tp": 1}
    assert topology.groups("cp")[:2] == ((0, 2), (1, 3))
    assert topology.groups("dp")[:2] == ((0, 4), (1, 5))
    assert topology.peers(13, "pp") == (5, 13)
    assert repr(topology) == "Topology(tp=2, dp=2, cp=2, pp=2)"


@pytest.mark.parametrize("sizes", [{"tp": 2, "dp": 4}, {"tp": 2, "dp": 2, "cp": 2}, {"tp": 2, "dp": 4, "pp": 2}])
def test_experts_lie_over_consecutive_replicas_and_parts_of_sequences(sizes: dict[str, int]) -> None:
    topology = Topology(**sizes, ep=2)
    assert topology.groups("ep")[:2] == ((0, 2), (1, 3))
    assert topology.coordinate(3)["ep"] == 1
    assert topology.world_size == Topology(**sizes).world_size
    assert sorted(chain.from_iterable(topology.groups("ep"))) == list(range(topology.world_size))
    with pytest.raises(UsageError, match=r"ep=3: expected a divisor of dp \* cp = 4"):
        Topology(**sizes, ep=3)


def test_the_order_is_megatrons() -> None:
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    topology = Topology(tp=2, cp=2, dp=2, pp=2, ep=2)
    dense = parallel_state.RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    experts = parallel_state.RankGenerator(tp=2, ep=2, dp=2, pp=2, cp=1, order="tp-cp-ep-dp-pp")
    for axis, generator in [*((axis, dense) for axis in ("tp", "cp", "dp", "pp")), ("ep", experts)]:
        assert sorted(topology.groups(axis)) == sorted(map(tuple, generator.get_ranks(axis)))


def test_a_device_mesh_has_the_same_groups() -> None:
    torch = pytest.importorskip("torch")
    topology = Topology(tp=2, cp=3, dp=2, pp=2)
    mesh = torch.arange(topology.world_size).reshape(tuple(topology.sizes.values()))
    for dim, axis in enumerate(topology.sizes):
        assert sorted(topology.groups(axis)) == sorted(
            map(tuple, mesh.movedim(dim, -1).reshape(-1, topology.sizes[axis]).tolist())
        )


def test_topologies_are_values() -> None:
    assert Topology(tp=2, dp=3) == Topology(dp=3, tp=2)
    assert hash(Topology(tp=2)) == hash(Topology(tp=2, dp=1))
    with pytest.raises(AttributeError):
        Topology().tp = 2  # type: ignore[misc]
