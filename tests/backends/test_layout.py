"""A layout maps every element of a tensor to a rank, whatever the cut: uneven, fused, padded, scattered."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck import UsageError
from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Replicate, Shard

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A placement of a tensor of some shape over some ranks."""

    shard: Shard
    shape: Shape
    num_ranks: int

    @property
    def layout(self) -> Layout:
        return Layout.from_placement(self.shape, self.shard, self.num_ranks)

    @property
    def full(self) -> torch.Tensor:
        return torch.arange(1.0, prod(self.shape) + 1).reshape(self.shape)

    @property
    def shards(self) -> list[torch.Tensor]:
        """The shards, concatenated from slices: computed without a layout."""
        return [
            torch.cat([self.full.narrow(self.shard.dim, block.start, len(block)) for block in blocks], self.shard.dim)
            for blocks in (
                list(self.shard.ranges(self.shape[self.shard.dim], self.num_ranks, rank))
                for rank in range(self.num_ranks)
            )
        ]


@st.composite
def cuts(draw: st.DrawFn, smallest: int = 0) -> Cut:
    """Draw fused blocks of any sizes, each cut unevenly; ranks may hold nothing of a block, or nothing at all."""
    num_ranks, num_blocks = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    block = st.tuples(*[st.integers(smallest, 3)] * num_ranks).filter(sum)
    sizes = tuple(draw(block) for _ in range(num_blocks))
    blocks = tuple(sum(chunks) for chunks in sizes) if num_blocks > 1 else 1
    shape = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = sum(map(sum, sizes))
    return Cut(Shard(dim, blocks=blocks, sizes=sizes), tuple(shape), num_ranks)


@given(cuts())
def test_each_rank_gets_its_slices_of_every_block(cut: Cut) -> None:
    for tp_rank, expected in enumerate(cut.shards):
        assert torch.equal(cut.layout.local(cut.full, tp_rank), expected)
        assert cut.layout.local_shapes[tp_rank] == tuple(expected.shape)


@given(cuts())
def test_shards_assemble_to_the_full_tensor(cut: Cut) -> None:
    assert torch.equal(cut.layout.assemble(cut.shards), cut.full)


@given(cuts(smallest=1))
def test_the_placement_can_be_read_from_the_layout(cut: Cut) -> None:
    assert cut.layout.placement() == cut.shard


@given(cuts())
def test_where_ranks_hold_nothing_of_a_block_the_placement_that_is_read_is_equivalent(cut: Cut) -> None:
    placement = cut.layout.placement()
    assert isinstance(placement, Shard)
    assert torch.equal(Layout.from_placement(cut.shape, placement, cut.num_ranks).source, cut.layout.source)  # type: ignore[arg-type]


@st.composite
def scattered(draw: st.DrawFn) -> tuple[Shape, list[torch.Tensor]]:
    """Draw any assignment of elements to ranks, in any order."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    order = draw(st.permutations(range(prod(shape))))
    borders = sorted(draw(st.lists(st.integers(0, len(order)), min_size=1, max_size=3)))
    return shape, [torch.tensor(order[a:b], dtype=torch.int64) for a, b in pairwise([0, *borders, len(order)])]


@given(scattered())
def test_a_layout_from_positions_returns_every_element_to_its_place(drawn: tuple[Shape, list[torch.Tensor]]) -> None:
    shape, positions = drawn
    layout = Layout.from_positions(shape, positions)
    full = torch.randn(shape)
    shards = [full.reshape(-1)[of_rank] for of_rank in positions]
    assert torch.equal(layout.assemble(shards), full)
    assert all(torch.equal(layout.local(full, rank), shard) for rank, shard in enumerate(shards))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_padding_is_zero_in_the_shards_and_absent_from_the_full_tensor(rows: int, tp: int, extra: int) -> None:
    """As a vocabulary that is padded to a multiple of the TP size: every rank holds as many rows."""
    local_rows = -(-rows // tp) + extra
    starts = list(accumulate([local_rows] * tp, initial=0))
    layout = Layout((rows, 2), ((local_rows, 2),) * tp, torch.arange(2 * rows))
    full = torch.arange(1.0, 2 * rows + 1).reshape(rows, 2)
    padded = torch.cat([full, torch.zeros(starts[-1] - rows, 2)])
    shards = [padded[a:b] for a, b in pairwise(starts)]
    assert all(torch.equal(layout.local(full, tp_rank), shard) for tp_rank, shard in enumerate(shards))
    assert torch.equal(layout.assemble(shards), full)


def test_a_padded_layout_has_no_placement() -> None:
    assert Layout((3, 2), ((2, 2), (2, 2)), torch.arange(6)).placement() is None


@pytest.mark.parametrize("placement", [Shard(-1), Shard(1)])
def test_a_negative_dim_counts_from_the_end(placement: Shard) -> None:
    assert Layout.from_placement((2, 4), placement, 2).local_shapes == ((2, 2), (2, 2))
    assert Layout.placed == Layout.from_placement  # its name in version 0.1


def test_without_sizes_shards_are_the_chunks_of_torch() -> None:
    full = torch.arange(10.0).reshape(5, 2)
    layout = Layout.from_placement((5, 2), Shard(0), 3)
    assert [layout.local(full, rank).tolist() for rank in range(3)] == [part.tolist() for part in full.chunk(3)]


def test_a_replicated_layout_gives_every_rank_the_full_tensor() -> None:
    layout = Layout.replicated((2, 3), tp=2)
    full = torch.randn(2, 3)
    assert layout.is_replicated
    assert layout.placement() == Replicate()
    assert torch.equal(layout.local(full, 1), full)
    assert torch.equal(layout.assemble([full, full]), full)


@pytest.mark.parametrize("local_shapes", [((2,), (2,)), ((1, 2), (1, 2))])
def test_a_layout_that_cuts_more_than_one_dim_has_no_placement(local_shapes: tuple[Shape, ...]) -> None:
    layout = Layout((2, 2), local_shapes, torch.tensor([0, 2, 3, 1]))
    full = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert layout.placement() is None
    assert torch.equal(layout.assemble([layout.local(full, 0), layout.local(full, 1)]), full)


def test_blocks_that_do_not_divide_the_dim_are_refused() -> None:
    with pytest.raises(UsageError, match="blocks=3: expected a divisor of 8"):
        Layout.from_placement((8,), Shard(0, blocks=3), 2)
