"""The placement of an activation is the one that its parts really have."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.evidence import UP, key, right_evidence
from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Placement, Replicate, Shard
from tpcheck.numerics.activation_placement import PlacedTensor, cut_by_sample, infer_placement, placement_of_features
from tpcheck.numerics.differences import compare_placed

RIGHT = right_evidence()
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


@pytest.mark.parametrize("shapes", [[(2, 5), (2, 5)], [(1, 6), (1, 6)], [(2, 12, 1), (2, 12)], [(2, 6), (2, 6, 1)]])
def test_parts_that_do_not_make_up_the_full_tensor_have_no_placement(shapes: list[tuple[int, ...]]) -> None:
    assert infer_placement(FULL.shape, [torch.zeros(shape) for shape in shapes]) is None


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("block.up output", Shard(0, sizes=((4, 4),))),
        ("block.up input", None),  # a weight, [out, in], that is cut along its outputs says nothing of its inputs
        ("block.down input", Shard(1, sizes=((4, 4),))),
        ("block.down output", None),
        ("block.norm output", None),
        ("block output", None),  # which has no weight
    ],
)
def test_the_weight_of_a_module_shows_how_its_features_are_cut(name: str, placement: Placement | None) -> None:
    assert placement_of_features(RIGHT, key(name)) == placement


def test_fused_blocks_of_a_weight_are_those_of_its_features() -> None:
    fused = Layout.from_placement((8, 4), Shard(0, blocks=2), 2)
    found = placement_of_features(replace(RIGHT, layouts={**RIGHT.layouts, UP: fused}), key("block.up output"))
    assert isinstance(found, Shard)
    assert found.sizes == ((2, 2), (2, 2))


HEADS = torch.arange(12.0).reshape(12, 1)  # dim 0: two samples of six heads


def by_sample(placed: PlacedTensor | None, batch_size: int = 2) -> list[PlacedTensor]:
    assert placed is not None
    return list(cut_by_sample(placed, HEADS, batch_size))


def test_the_heads_of_each_sample_may_be_cut() -> None:
    samples = HEADS.chunk(2)
    parts = [torch.cat([sample[:2] for sample in samples]), torch.cat([sample[2:] for sample in samples])]
    (placed,) = by_sample(infer_placement(HEADS.shape, parts))
    assert placed.num_blocks == 2
    assert compare_placed(placed, HEADS, allowed=0.0).agrees


@pytest.mark.parametrize(
    ("placement", "parts", "batch_size"),
    [
        (Replicate(), [HEADS, HEADS], 2),
        (Shard(1), [HEADS, HEADS[:, :0]], 2),  # another dim is cut
        (Shard(0), HEADS.chunk(2), 1),  # a single sample
        (Shard(0), HEADS.chunk(2), 5),  # no whole number of heads
        (Shard(0), HEADS.split([5, 7]), 2),  # of a rank
        (Shard(0), HEADS.chunk(1), 2),  # a single rank
        (Shard(0), HEADS.chunk(3)[:2], 2),  # heads are missing
    ],
)
def test_other_parts_are_not_cut_by_sample(placement: Placement, parts: list[torch.Tensor], batch_size: int) -> None:
    assert by_sample(PlacedTensor(placement, tuple(parts)), batch_size) == []


def test_a_tensor_that_is_not_cut_is_one_block() -> None:
    placed = PlacedTensor(Replicate(), (HEADS, HEADS))
    assert placed.num_blocks == 1
    assert not placed.is_fused
