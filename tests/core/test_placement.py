"""A placement says which indices of a dim a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck import UsageError
from tpcheck.core.placement import Shard


@dataclass(frozen=True)
class Cut:
    """A shard, the dim that it cuts, and over how many ranks."""

    shard: Shard
    dim_size: int
    num_ranks: int

    def indices(self, rank: int) -> list[int]:
        return list(chain.from_iterable(self.shard.ranges(self.dim_size, self.num_ranks, rank)))


@st.composite
def equal_blocks(draw: st.DrawFn) -> Cut:
    blocks, block_size = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    return Cut(Shard(0, blocks=blocks), blocks * block_size, draw(st.integers(1, 6)))


@st.composite
def uneven_blocks(draw: st.DrawFn) -> Cut:
    blocks = tuple(draw(st.lists(st.integers(0, 12), min_size=1, max_size=5)))
    return Cut(Shard(0, blocks=blocks), sum(blocks), draw(st.integers(1, 6)))


@st.composite
def given_sizes(draw: st.DrawFn) -> Cut:
    num_ranks, num_blocks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    sizes = tuple(
        tuple(draw(st.lists(st.integers(0, 5), min_size=num_ranks, max_size=num_ranks))) for _ in range(num_blocks)
    )
    blocks = tuple(sum(block) for block in sizes)
    return Cut(Shard(0, blocks=blocks, sizes=sizes), sum(blocks), num_ranks)


CUTS = st.one_of(equal_blocks(), uneven_blocks(), given_sizes())


@given(CUTS)
def test_every_index_is_on_exactly_one_rank(cut: Cut) -> None:
    indices = chain.from_iterable(cut.indices(rank) for rank in range(cut.num_ranks))
    assert sorted(indices) == list(range(cut.dim_size))


@given(CUTS)
def test_every_rank_has_one_range_of_every_block_in_order(cut: Cut) -> None:
    borders = list(accumulate(cut.shard.block_sizes(cut.dim_size), initial=0))
    for rank in range(cut.num_ranks):
        ranges = list(cut.shard.ranges(cut.dim_size, cut.num_ranks, rank))
        assert len(ranges) == len(borders) - 1
        assert all(
            start <= indices.start <= indices.stop <= stop
            for indices, start, stop in zip(ranges, borders[:-1], borders[1:], strict=True)
        )


@given(CUTS)
def test_local_sizes_are_those_of_the_ranges(cut: Cut) -> None:
    sizes = [cut.shard.local_size(cut.dim_size, cut.num_ranks, rank) for rank in range(cut.num_ranks)]
    assert sizes == [len(cut.indices(rank)) for rank in range(cut.num_ranks)]
    assert sum(sizes) == cut.dim_size


@given(CUTS, st.data())
def test_shard_then_assemble_is_the_identity(cut: Cut, data: st.DataObject) -> None:
    full = data.draw(st.lists(st.integers(), min_size=cut.dim_size, max_size=cut.dim_size))
    assembled: list[int | None] = [None] * cut.dim_size
    for rank in range(cut.num_ranks):
        part = [full[index] for index in cut.indices(rank)]
        for index, value in zip(cut.indices(rank), part, strict=True):
            assembled[index] = value
    assert assembled == full


@given(st.integers(0, 40), st.integers(1, 8))
def test_chunks_are_those_of_torch(dim_size: int, num_ranks: int) -> None:
    torch = pytest.importorskip("torch")
    chunks = [chunk.tolist() for chunk in torch.arange(dim_size).chunk(num_ranks)]
    actual = [Cut(Shard(0), dim_size, num_ranks).indices(rank) for rank in range(num_ranks)]
    assert [part for part in actual if part] == [chunk for chunk in chunks if chunk]


def test_fused_query_key_value_is_cut_block_by_block() -> None:
    fused = Shard(0, blocks=(8, 4, 4))  # 4 query heads and 2 key and value heads, each 2 wide
    assert [list(indices) for indices in fused.ranges(16, num_ranks=2, rank=1)] == [[4, 5, 6, 7], [10, 11], [14, 15]]


@pytest.mark.parametrize(
    ("shard", "name", "accepted"),
    [
        (Shard(0, blocks=3), "blocks", "a divisor of 8"),
        (Shard(0, blocks=0), "blocks", "a divisor of 8"),
        (Shard(0, blocks=(4, 5)), "blocks", "sizes that add up to 8"),
        (Shard(0, blocks=(9, -1)), "blocks", "sizes that add up to 8"),
        (Shard(0, sizes=((4, 5),)), "sizes", "2 sizes that add up to 8 in block 0"),
        (Shard(0, sizes=((8,),)), "sizes", "2 sizes that add up to 8 in block 0"),
        (Shard(0, sizes=((9, -1),)), "sizes", "2 sizes that add up to 8 in block 0"),
        (Shard(0, blocks=2, sizes=((2, 2),)), "sizes", "one tuple for each of 2 blocks"),
        (Shard(0, sizes=((4, 4), (1, 1))), "sizes", "one tuple for each of 1 blocks"),
    ],
)
def test_parts_that_do_not_make_the_whole_raise_a_usage_error(shard: Shard, name: str, accepted: str) -> None:
    with pytest.raises(UsageError) as error:
        list(shard.ranges(8, num_ranks=2, rank=0))
    assert (error.value.name, error.value.accepted) == (name, accepted)
    assert error.value.value == getattr(shard, name)


@pytest.mark.parametrize(
    ("dim_size", "num_ranks", "rank", "name"),
    [(8, 2, 2, "rank"), (8, 2, -1, "rank"), (8, 0, 0, "num_ranks"), (-8, 2, 0, "dim_size")],
)
def test_an_impossible_rank_or_size_raises_a_usage_error(dim_size: int, num_ranks: int, rank: int, name: str) -> None:
    with pytest.raises(UsageError) as error:
        list(Shard(0).ranges(dim_size, num_ranks, rank))
    assert error.value.name == name
