"""Outputs of modules are placed in the whole one by the batch's shape, so that sketches of all ranks add up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tpcheck.numerics.sketch import Sketch, distance, sketch
from tpcheck.runs.recording.activations import ActivationPlaces, BatchShape, Place

TOKENS = torch.arange(12).reshape(3, 4)
HIDDEN_BTH = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def places(tensor: torch.Tensor, *, tp: int = 1, tp_rank: int = 0, tokens: torch.Tensor = TOKENS) -> tuple[Place, ...]:
    return ActivationPlaces(BatchShape.of([tokens]), tp, tp_rank).places(tensor)


def sketched(tensor: torch.Tensor, place: Place) -> Sketch:
    return sketch(tensor, place.index, rows=place.rows)


def whole(tensor: torch.Tensor = HIDDEN_BTH) -> Sketch:
    return sketched(tensor, places(tensor)[0])


def whole_of(tensor: torch.Tensor, tokens: torch.Tensor) -> Sketch:
    return sketched(tensor, places(tensor, tokens=tokens)[0])


def total(parts: Sequence[torch.Tensor], label: str) -> Sketch:
    """Return the sum of the ranks' sketches, each read as a shard of this label."""
    result = Sketch.zero()
    for rank, part in enumerate(parts):
        [place] = [each for each in places(part, tp=len(parts), tp_rank=rank) if each.label == label]
        result += sketched(part, place)
    return result


def assert_equal(actual: Sketch, expected: Sketch) -> None:
    assert distance(actual, expected) < 1e-12
    assert actual.sum_squares == pytest.approx(expected.sum_squares)


def test_tokens_give_the_samples_and_their_length() -> None:
    batch = BatchShape.of([torch.ones(3, 4, dtype=torch.float64), TOKENS])
    assert batch.samples is not None
    assert (len(batch.samples), batch.length) == (3, 4)


def test_without_tokens_the_first_tensor_gives_the_samples() -> None:
    assert BatchShape.of([torch.ones(5, 2)]).length is None
    assert BatchShape.of([torch.ones(5, 2, 3)]).length == 2
    assert BatchShape.of([torch.tensor(1.0)]).samples is None


def test_shards_of_the_last_dim_add_up() -> None:
    assert_equal(total(HIDDEN_BTH.chunk(2, -1), "dim -1"), whole())


def test_slices_of_the_sequence_add_up() -> None:
    parts = HIDDEN_BTH.chunk(2, 1)
    assert [each.label for each in places(parts[0], tp=2)] == ["sequence"]
    assert_equal(total(parts, "sequence"), whole())


def test_slices_of_a_sequence_that_comes_first_add_up() -> None:
    assert_equal(total(HIDDEN_BTH.transpose(0, 1).chunk(2, 0), "sequence"), whole())


def test_heads_add_up() -> None:
    scores_BHTT = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    assert_equal(total(scores_BHTT.chunk(2, 1), "dim 1"), whole(scores_BHTT))


def test_one_head_for_each_rank_adds_up() -> None:
    keys_BTHD = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    assert_equal(total(keys_BTHD.chunk(2, 2), "dim 2"), whole(keys_BTHD))


def test_the_order_of_dims_does_not_matter() -> None:
    assert_equal(whole(HIDDEN_BTH.transpose(0, 1)), whole())
    assert_equal(whole(HIDDEN_BTH.flatten(0, 1)), whole())


def test_tokens_that_are_flattened_position_by_position_are_recognised_after_one_such_output() -> None:
    finder = ActivationPlaces(BatchShape.of([TOKENS]), 1, 0)
    sequence_first = HIDDEN_BTH.transpose(0, 1)
    finder.places(sequence_first)
    flat = sequence_first.flatten(0, 1)
    assert_equal(sketched(flat, finder.places(flat)[0]), whole())


def test_what_lies_as_the_arguments_is_read_so_in_a_model_that_puts_positions_first() -> None:
    tokens = TOKENS[:, :3]  # as many samples as positions: the shape does not tell
    hidden = HIDDEN_BTH[:, :3]
    finder = ActivationPlaces(BatchShape.of([tokens]), 1, 0, is_sequence_first=True)
    expected = whole_of(hidden, tokens)
    assert_equal(sketched(hidden.transpose(0, 1), finder.places(hidden.transpose(0, 1))[0]), expected)
    assert_equal(sketched(hidden, finder.places(hidden, lies_as_inputs=True)[0]), expected)


def test_samples_add_up_over_micro_batches_in_any_order() -> None:
    order = torch.tensor([2, 0, 1])
    parts = [(TOKENS[each], HIDDEN_BTH[each]) for each in (order[:1], order[1:])]
    summed = Sketch.zero()
    for tokens, hidden in parts:
        summed += sketched(hidden, places(hidden, tokens=tokens)[0])
    assert_equal(summed, whole())


def test_an_output_without_samples_is_taken_as_it_is() -> None:
    table = torch.randn(1, 7, 6, dtype=torch.float64)
    place, *others = places(table, tp=2)
    assert (place.label, place.shape, place.rows) == ("whole", (1, 7, 6), None)
    assert [(each.label, each.shape) for each in others] == [("dim -1", (1, 7, 12))]


def test_one_number_for_each_sample_is_a_row_for_each() -> None:
    assert places(torch.ones(3, 2))[0].shape == (-1, 2)
    assert places(torch.ones(3))[0].shape == (-1,)
