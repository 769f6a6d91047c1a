"""Differences are measured over the full tensor, in norms that know infinities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Shard
from tpcheck.numerics.activation_placement import infer_placement
from tpcheck.numerics.differences import (
    Difference,
    compare_parameter,
    compare_placed,
    distance_of_terms,
    frobenius_distance,
    largest_element,
    rounding_error,
    spacing,
)

FULL = torch.arange(24, dtype=torch.float64).reshape(2, 12)


def test_the_wrong_rank_and_the_largest_element_are_named() -> None:
    wrong = FULL.clone()
    wrong[1, 3] += 0.5
    wrong[0, 0] -= 0.1
    placed = infer_placement(FULL.shape, [FULL, wrong])
    assert placed is not None
    found = compare_placed(placed, FULL, allowed=1e-9)
    assert not found.agrees
    assert found.wrong_tp_ranks() == (1,)
    assert (found.largest, found.largest_at, found.count_differing) == (0.5, (1, 3), 2)
    assert found.error == pytest.approx(math.hypot(0.5, 0.1))
    assert found.margin == pytest.approx(found.error / 1e-9)


def test_sharded_errors_add_up_and_replicated_ones_do_not() -> None:
    off = torch.full((1, 2), 3.0)
    zeros = torch.zeros(1, 4)
    sharded, replicated = infer_placement((1, 4), [off, off]), infer_placement((1, 2), [off, off])
    assert sharded is not None
    assert replicated is not None
    of_shards, of_replicas = compare_placed(sharded, zeros, 0.0), compare_placed(replicated, zeros[:, :2], 0.0)
    assert (of_shards.error, of_shards.count_differing) == (pytest.approx(6), 4)
    assert (of_replicas.error, of_replicas.count_differing) == (pytest.approx(math.sqrt(18)), 2)


def test_nan_and_infinities_agree_with_themselves_alone() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert frobenius_distance(odd, odd.clone()) == 0
    assert frobenius_distance(odd, torch.zeros(4)) == math.inf
    assert frobenius_distance(torch.zeros(4), odd) == math.inf
    assert frobenius_distance(torch.zeros(4), torch.zeros(5)) == math.inf


def test_empty_tensors_agree() -> None:
    placed = infer_placement((0, 3), [torch.zeros(0, 3), torch.zeros(0, 3)])
    assert placed is not None
    assert compare_placed(placed, torch.zeros(0, 3), 0.0).agrees


def test_a_parameter_is_compared_through_its_layout() -> None:
    layout = Layout((4,), ((2,), (2,)), torch.tensor([2, 3, 0, 1]))  # rank 1 holds the first half
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0])
    right = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])]
    assert compare_parameter(layout, expected, right, 0.0).agrees
    found = compare_parameter(layout, expected, [right[0], torch.tensor([1.0, 2.5])], 0.0)
    assert (found.largest, found.largest_at, found.wrong_tp_ranks()) == (0.5, (1,), (1,))


@pytest.mark.parametrize("layout", [Layout.replicated((4,), tp=2), Layout.from_placement((4,), Shard(0), tp=2)])
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
def test_features_are_complete_on_every_rank_or_terms_of_a_sum(partial: set[int], num_ranks: int) -> None:
    parts = [FULL.clone() for _ in range(num_ranks)]
    for part in parts[1:]:
        part[:, sorted(partial)] = 0  # rank 0 has the full sum
    assert distance_of_terms(parts, FULL) == 0
    parts[0][1, 5] += 3.0
    assert distance_of_terms(parts, FULL) == pytest.approx(3.0)


def test_a_vector_is_complete_or_a_sum_as_one() -> None:
    halves = [torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 3.0])]
    assert distance_of_terms(halves, torch.tensor([1.0, 2.0, 6.0])) == 0
    assert distance_of_terms(halves, torch.tensor([1.0, 2.0, 3.0])) > 1


def difference(error: float, *part_errors: float, allowed: float = 1.0, norm: float = 2.0) -> Difference:
    return Difference(error, norm, allowed, part_errors, 0.0, (), 1)


def test_the_wrong_ranks_are_those_beyond_what_is_allowed_or_all_that_differ_where_none_is() -> None:
    assert difference(3.0, 0.5, 3.0, 0.0).wrong_tp_ranks() == (1,)
    assert difference(1.2, 0.9, 0.0, 0.8).wrong_tp_ranks() == (0, 2)


def test_errors_are_relative_to_a_norm_that_is_a_number_above_zero() -> None:
    assert (difference(3.0).relative, difference(3.0).relative_allowed) == (1.5, 0.5)
    assert difference(3.0, norm=0.0).relative == 3.0
    assert difference(3.0, norm=math.inf).relative == 3.0


def test_the_margin_is_zero_where_nothing_differs_and_infinite_where_nothing_is_allowed() -> None:
    assert difference(3.0, allowed=2.0).margin == 1.5
    assert difference(0.0, allowed=0.0).margin == 0.0
    assert difference(3.0, allowed=0.0).margin == math.inf


def test_integers_and_masks_do_not_round() -> None:
    assert rounding_error(torch.ones(3, dtype=torch.int64)) == 0
    assert spacing(torch.ones(3, dtype=torch.int64)) == 0
    assert spacing(torch.full((3,), math.inf)) == 0
    assert rounding_error(torch.empty(0)) == 0


def test_a_single_element_rounds_twice_and_complex_ones_round_too() -> None:
    eps = torch.finfo(torch.float64).eps
    assert rounding_error(torch.tensor([3.0], dtype=torch.float64)) == 6 * eps
    assert rounding_error(torch.tensor([3.0, 4.0], dtype=torch.float64)) == pytest.approx(5 * eps / math.sqrt(3))
    pair = torch.tensor([3.0 + 4.0j, 0.0], dtype=torch.complex128)
    assert rounding_error(pair) == pytest.approx(5 * eps / math.sqrt(3))
    assert frobenius_distance(pair, pair * 2) == 5.0


def test_replicas_of_a_parameter_are_as_far_off_as_the_farthest() -> None:
    layout, full = Layout.replicated((2, 12), 2), FULL
    found = compare_parameter(layout, full, [full + 1, full + 2], 1.0)
    assert found.error == pytest.approx(2 * math.sqrt(24))
    assert found.part_errors == pytest.approx((math.sqrt(24), 2 * math.sqrt(24)))
