"""Differences are measured over the whole tensor, through the placement that the parts really have."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Replicate, Shard
from tpcheck.numerics.differences import (
    compare_parameter,
    compare_placed,
    distance_of_terms,
    frobenius_distance,
    largest_element,
    place,
    rounding_error,
    spacing,
)

WHOLE = torch.arange(24, dtype=torch.float64).reshape(2, 12)


def test_equal_shapes_are_replicas() -> None:
    placed = place(WHOLE.shape, [WHOLE, WHOLE])
    assert placed is not None
    assert placed.placement == Replicate()


@given(st.lists(st.integers(0, 6), min_size=2, max_size=4), st.integers(0, 1))
def test_parts_of_any_sizes_that_add_up_are_shards_in_rank_order(sizes: list[int], dim: int) -> None:
    shape = [3, 3]
    shape[dim] = sum(sizes)
    whole = torch.randn(shape)
    parts = list(whole.split(sizes, dim=dim))
    placed = place(whole.shape, parts)
    assert placed is not None
    found = compare_placed(placed, whole, allowed=0.0)
    assert found.agrees
    assert found.error == 0


def test_blocks_are_followed_where_the_weight_tells_of_them() -> None:
    q, k = WHOLE.split(6, dim=1)
    parts = [torch.cat([q[:, :3], k[:, :3]], dim=1), torch.cat([q[:, 3:], k[:, 3:]], dim=1)]
    hint = Shard(0, blocks=(6, 6), sizes=((3, 3), (3, 3)))
    fused, naive = place(WHOLE.shape, parts, hint), place(WHOLE.shape, parts)
    assert fused is not None
    assert naive is not None
    assert fused.is_fused
    assert compare_placed(fused, WHOLE, allowed=0.0).agrees
    assert not compare_placed(naive, WHOLE, allowed=0.0).agrees


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
    whole = WHOLE if dim else WHOLE.t()
    placed = place(whole.shape, whole.chunk(2, dim=dim), hint)
    assert placed is not None
    assert placed.placement == Shard(dim, sizes=((6, 6),))
    assert not placed.is_fused


def test_a_rank_may_hold_nothing() -> None:
    placed = place(WHOLE.shape, [WHOLE, WHOLE[:, :0]])
    assert placed is not None
    assert compare_placed(placed, WHOLE, allowed=0.0).agrees


@pytest.mark.parametrize("shapes", [[(2, 5), (2, 5)], [(1, 6), (1, 6)], [(2, 12, 1), (2, 12)]])
def test_parts_that_do_not_make_up_the_whole_have_no_placement(shapes: list[tuple[int, ...]]) -> None:
    assert place(WHOLE.shape, [torch.zeros(shape) for shape in shapes]) is None


def test_the_wrong_rank_and_the_largest_element_are_named() -> None:
    wrong = WHOLE.clone()
    wrong[1, 3] += 0.5
    wrong[0, 0] -= 0.1
    placed = place(WHOLE.shape, [WHOLE, wrong])
    assert placed is not None
    found = compare_placed(placed, WHOLE, allowed=1e-9)
    assert not found.agrees
    assert found.wrong_tp_ranks() == (1,)
    assert (found.largest, found.largest_at, found.count_differing) == (0.5, (1, 3), 2)
    assert found.error == pytest.approx(math.hypot(0.5, 0.1))
    assert found.margin == pytest.approx(found.error / 1e-9)


def test_sharded_errors_add_up_and_replicated_ones_do_not() -> None:
    off = torch.full((1, 2), 3.0)
    zeros = torch.zeros(1, 4)
    sharded, replicated = place((1, 4), [off, off]), place((1, 2), [off, off])
    assert sharded is not None
    assert replicated is not None
    assert compare_placed(sharded, zeros, 0.0).error == pytest.approx(6)
    assert compare_placed(replicated, zeros[:, :2], 0.0).error == pytest.approx(math.sqrt(18))


def test_nan_and_infinities_agree_with_themselves_alone() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert frobenius_distance(odd, odd.clone()) == 0
    assert frobenius_distance(odd, torch.zeros(4)) == math.inf
    assert frobenius_distance(torch.zeros(4), odd) == math.inf
    assert frobenius_distance(torch.zeros(4), torch.zeros(5)) == math.inf


def test_empty_tensors_agree() -> None:
    placed = place((0, 3), [torch.zeros(0, 3), torch.zeros(0, 3)])
    assert placed is not None
    assert compare_placed(placed, torch.zeros(0, 3), 0.0).agrees


def test_a_parameter_is_compared_through_its_layout() -> None:
    layout = Layout((4,), ((2,), (2,)), torch.tensor([2, 3, 0, 1]))  # rank 1 holds the first half
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0])
    right = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])]
    assert compare_parameter(layout, expected, right, 0.0).agrees
    found = compare_parameter(layout, expected, [right[0], torch.tensor([1.0, 2.5])], 0.0)
    assert (found.largest, found.largest_at, found.wrong_tp_ranks()) == (0.5, (1,), (1,))


@pytest.mark.parametrize("layout", [Layout.replicated((4,), tp=2), Layout.placed((4,), Shard(0), tp=2)])
def test_shapes_that_do_not_fit_the_layout_make_the_error_infinite(layout: Layout) -> None:
    right = [torch.zeros(shape) for shape in layout.local_shapes]
    assert compare_parameter(layout, torch.zeros(4), [right[0], torch.zeros(3)], 1.0).margin == math.inf
    assert compare_parameter(layout, torch.zeros(5), right, 1.0).margin == math.inf
    assert compare_parameter(layout, torch.zeros(4), right, 1.0).margin == 0


@pytest.mark.parametrize("index", [(), (2,), (1, 0, 2)])
def test_the_largest_element_is_named_by_its_index(index: tuple[int, ...]) -> None:
    gap = torch.zeros([3] * len(index))
    gap[index] = -2.0
    assert largest_element(gap) == (2.0, index)
    assert largest_element(torch.zeros(0, 3)) == (0.0, ())


def test_rounding_floors_follow_the_dtype_and_ignore_masks() -> None:
    ones = torch.ones(100, dtype=torch.bfloat16)
    assert rounding_error(ones) == pytest.approx(10 * 2**-7 / math.sqrt(3))
    assert spacing(ones) == 2**-7
    mask = torch.tensor([0.0, torch.finfo(torch.float64).min], dtype=torch.float64)
    assert rounding_error(torch.cat([mask, mask])) == 0
    assert spacing(torch.tensor([1.0, -float("inf")])) == torch.finfo(torch.float32).eps


@given(st.sets(st.integers(0, 11)), st.integers(2, 4))
def test_features_are_whole_on_every_rank_or_terms_of_a_sum(partial: set[int], num_ranks: int) -> None:
    parts = [WHOLE.clone() for _ in range(num_ranks)]
    for part in parts[1:]:
        part[:, sorted(partial)] = 0  # rank 0 has the whole sum
    assert distance_of_terms(parts, WHOLE) == 0
    parts[0][1, 5] += 3.0
    assert distance_of_terms(parts, WHOLE) == pytest.approx(3.0)


def test_a_vector_is_whole_or_a_sum_as_one() -> None:
    halves = [torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 3.0])]
    assert distance_of_terms(halves, torch.tensor([1.0, 2.0, 6.0])) == 0
    assert distance_of_terms(halves, torch.tensor([1.0, 2.0, 3.0])) > 1
