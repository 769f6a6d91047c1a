"""A layout is an exact map between a tensor and its shards, whatever the cut."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Replicate, Shard


def layout_of(shard: Shard, shape: tuple[int, ...], num_ranks: int) -> Layout:
    """The layout that a backend would report which cuts by `shard`."""
    ids = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    parts = [indices_of(ids, shard, num_ranks, rank) for rank in range(num_ranks)]
    source = torch.empty(ids.numel(), dtype=torch.int64)
    source[torch.cat([part.reshape(-1) for part in parts])] = torch.arange(ids.numel())
    return Layout(shape, tuple(tuple(part.shape) for part in parts), source)


def indices_of(ids: torch.Tensor, shard: Shard, num_ranks: int, rank: int) -> torch.Tensor:
    ranges = shard.ranges(ids.shape[shard.dim], num_ranks, rank)
    return torch.cat([ids.narrow(shard.dim, each.start, len(each)) for each in ranges], dim=shard.dim)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Shard, tuple[int, ...], int]:
    num_ranks = draw(st.integers(2, 4))
    num_blocks = draw(st.integers(1, 3))
    sizes = tuple(
        tuple(draw(st.lists(st.integers(1, 3), min_size=num_ranks, max_size=num_ranks))) for _ in range(num_blocks)
    )
    blocks = tuple(sum(block) for block in sizes) if num_blocks > 1 else 1
    dim = draw(st.integers(0, 1))
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    shape[dim] = sum(map(sum, sizes))
    return Shard(dim, blocks=blocks, sizes=sizes), (shape[0], shape[1]), num_ranks


@given(cuts())
def test_shards_cut_by_a_layout_assemble_to_the_whole(cut: tuple[Shard, tuple[int, ...], int]) -> None:
    shard, shape, num_ranks = cut
    layout = layout_of(shard, shape, num_ranks)
    whole = torch.randn(shape)
    assert torch.equal(layout.assemble([layout.local(whole, rank) for rank in range(num_ranks)]), whole)


@given(cuts())
def test_the_placement_is_read_off_the_layout(cut: tuple[Shard, tuple[int, ...], int]) -> None:
    shard, shape, num_ranks = cut
    assert layout_of(shard, shape, num_ranks).placement() == shard


def test_a_replicated_layout_gives_everyone_everything() -> None:
    layout = Layout.replicated((2, 3), tp=2)
    whole = torch.randn(2, 3)
    assert layout.placement() == Replicate()
    assert torch.equal(layout.local(whole, 1), whole)


def test_a_layout_that_is_no_cut_of_one_dim_has_no_placement() -> None:
    scattered = Layout((2, 2), ((2,), (2,)), torch.tensor([0, 2, 3, 1]))
    assert scattered.placement() is None
    whole = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(scattered.assemble([scattered.local(whole, 0), scattered.local(whole, 1)]), whole)
