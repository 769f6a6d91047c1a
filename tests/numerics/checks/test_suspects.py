"""Every parameter is compared or says why not."""

from __future__ import annotations

from dataclasses import replace

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
