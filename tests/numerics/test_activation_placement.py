"""The placement of an activation is the one that its parts really have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.core.placement import Replicate, Shard
from tpcheck.numerics.activation_placement import infer_placement
from tpcheck.numerics.differences import compare_placed

FULL = torch.arange(24, dtype=torch.float64).reshape(2, 12)


def test_equal_shapes_are_replicas() -> None:
    placed = infer_placement(FULL.shape, [FULL, FULL])
    assert placed is not None
    assert placed.placement == Replicate()


@given(st.lists(st.integers(0, 6), min_size=2, max_size=4), st.integers(0, 1))
def test_parts_of_any_sizes_that_add_up_are_shards_in_rank_order(sizes: list[int], dim: int) -> None:
    shape = [3, 3]
    shape[dim] = sum(sizes)
    full = torch.randn(shape)
    parts = list(full.split(sizes, dim=dim))
    placed = infer_placement(full.shape, parts)
    assert placed is not None
    found = compare_placed(placed, full, allowed=0.0)
    assert found.agrees
    assert found.error == 0


def test_blocks_are_followed_where_the_weight_tells_of_them() -> None:
    q, k = FULL.split(6, dim=1)
    parts = [torch.cat([q[:, :3], k[:, :3]], dim=1), torch.cat([q[:, 3:], k[:, 3:]], dim=1)]
    hint = Shard(0, blocks=(6, 6), sizes=((3, 3), (3, 3)))
    fused, naive = infer_placement(FULL.shape, parts, hint), infer_placement(FULL.shape, parts)
    assert fused is not None
    assert naive is not None
    assert fused.is_fused
    assert compare_placed(fused, FULL, allowed=0.0).agrees
    assert not compare_placed(naive, FULL, allowed=0.0).agrees


@pytest.mark.parametrize(
    "hint",
    [
        Shard(0, blocks=(6, 6), sizes=((3, 3), (3, 3))),  # of other features than the weight gives
        Shard(0, blocks=(6, 6), sizes=((2, 4), (2, 4))),
        Replicate(),
    ],
)
def test_a_hint_that_does_not_fit_the_shapes_is_ignored(hint: Shard | Replicate) -> None:
    dim = 0 if isinstance(hint, Shard) and hint.sizes[0] == (3, 3) else 1
    full = FULL if dim else FULL.t()
    placed = infer_placement(full.shape, full.chunk(2, dim=dim), hint)
    assert placed is not None
    assert placed.placement == Shard(dim, sizes=((6, 6),))
    assert not placed.is_fused


def test_a_rank_may_hold_nothing() -> None:
    placed = infer_placement(FULL.shape, [FULL, FULL[:, :0]])
    assert placed is not None
    assert compare_placed(placed, FULL, allowed=0.0).agrees


@pytest.mark.parametrize("shapes", [[(2, 5), (2, 5)], [(1, 6), (1, 6)], [(2, 12, 1), (2, 12)]])
def test_parts_that_do_not_make_up_the_full_tensor_have_no_placement(shapes: list[tuple[int, ...]]) -> None:
    assert infer_placement(FULL.shape, [torch.zeros(shape) for shape in shapes]) is None
