"""Every parameter is compared or says why not."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.numerics.evidence import BIAS, DOWN, NORM, UP, right_evidence
from tpcheck.numerics.checks.suspects import compare_parameters

RIGHT = right_evidence()


def test_equal_shards_agree() -> None:
    compared, not_compared = compare_parameters(RIGHT, RIGHT.initial, RIGHT.initial_parts, lambda name, expected: 0.0)
    assert list(compared) == [NORM, UP, DOWN, BIAS]
    assert all(parameter.difference.agrees for parameter in compared.values())
    assert not not_compared


def test_no_gradient_is_a_gradient_of_zeros_where_the_other_side_has_one() -> None:
    gradients = RIGHT.reference[0].gradients
    nothing = [dict.fromkeys(gradients), {name: RIGHT.candidate[0][1].gradients[name] for name in gradients}]
    compared, _ = compare_parameters(RIGHT, gradients, nothing, lambda name, expected: 1e-9)
    assert not any(parameter.difference.agrees for parameter in compared.values())
    assert compared[UP].actual_parts[0].shape == (4, 4)
    assert not compared[UP].actual_parts[0].any()


def test_a_gradient_that_neither_side_has_is_not_counted() -> None:
    nothing = dict.fromkeys(RIGHT.initial)
    assert compare_parameters(RIGHT, nothing, [nothing, nothing], lambda name, expected: 0.0) == ({}, {})


def test_reasons_name_what_is_lacking() -> None:
    evidence = replace(RIGHT, layouts={name: layout for name, layout in RIGHT.layouts.items() if name != UP})
    parts = [{name: part[name] for name in part if name != DOWN} for part in RIGHT.initial_parts]
    compared, not_compared = compare_parameters(evidence, RIGHT.initial, parts, lambda name, expected: 0.0)
    assert list(compared) == [NORM, BIAS]
    assert not_compared == {
        UP: "its layer cannot gather it, so which part each rank holds is unknown",
        DOWN: "the sharded model has no parameter of this name",
    }


def test_a_gradient_that_only_the_ranks_have_is_compared_with_zeros() -> None:
    gradients = [rank.gradients for rank in RIGHT.candidate[0]]
    compared, _ = compare_parameters(RIGHT, {UP: None}, gradients, lambda name, expected: 1e-9)
    assert not compared[UP].difference.agrees
    assert compared[UP].expected.shape == RIGHT.initial[UP].shape
    assert not compared[UP].expected.any()
    some = [{UP: None}, gradients[1]]
    assert compare_parameters(RIGHT, {UP: None}, some, lambda *_: 1e-9)[0][UP].difference.wrong_tp_ranks() == (1,)


def test_a_parameter_that_one_rank_lacks_is_not_compared() -> None:
    parts = [RIGHT.initial_parts[0], {}]
    compared, not_compared = compare_parameters(RIGHT, {UP: RIGHT.initial[UP]}, parts, lambda *_: 0.0)
    assert not compared
    assert not_compared == {UP: "the sharded model has no parameter of this name"}


def test_each_rank_is_compared_with_its_part_of_a_tensor_of_the_shape_of_the_layout() -> None:
    expected = RIGHT.initial[UP]
    compared, _ = compare_parameters(RIGHT, {UP: expected}, RIGHT.initial_parts, lambda *_: 0.0)
    assert all(torch.equal(*pair) for pair in zip(compared[UP].expected_parts, expected.chunk(2), strict=True))
    compared, _ = compare_parameters(RIGHT, {UP: expected[:6]}, RIGHT.initial_parts, lambda *_: 0.0)
    assert compared[UP].expected_parts == ()
    assert not compared[UP].difference.agrees
