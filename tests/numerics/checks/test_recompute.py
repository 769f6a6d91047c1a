"""Linear modules are recomputed from each rank's inputs and weights; anything else is left alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.numerics.evidence import BIAS, DOWN, NORM, UP, key, right_evidence, with_step, with_tensor
from tpcheck.numerics.checks.recompute import (
    parts_of,
    recompute_input_gradient,
    recompute_linear,
    recompute_weight_gradient,
)
from tpcheck.numerics.checks.suspects import ComparedParameter, compare_parameters

RIGHT = right_evidence()
ALLOWED = 1e-12


def test_the_terms_of_a_row_parallel_layer_add_up_to_its_output() -> None:
    terms = recompute_linear(RIGHT, 0, key("block.down output"), ALLOWED)
    assert terms is not None
    assert terms.are_summed
    assert torch.equal(terms.bias, RIGHT.initial[BIAS])
    parts = parts_of(terms, [(2, 3, 4)] * 2)
    assert parts is not None
    torch.testing.assert_close(parts[1], RIGHT.reference[0].activations[key("block.down output")])


def test_a_whole_input_of_a_row_parallel_layer_is_cut_as_its_weight_is() -> None:
    full = RIGHT.reference[0].activations[key("block.down input")]
    evidence = with_tensor(RIGHT, "activations", key("block.down input"), lambda tensor: full)
    cut, given = (recompute_linear(each, 0, key("block.down output"), ALLOWED) for each in (RIGHT, evidence))
    assert cut is not None
    assert given is not None
    assert all(torch.equal(*pair) for pair in zip(cut.by_rank, given.by_rank, strict=True))


def test_the_output_of_a_column_parallel_layer_may_be_cut_or_gathered() -> None:
    terms = recompute_linear(RIGHT, 0, key("block.up output"), ALLOWED)
    assert terms is not None
    assert not terms.are_summed
    cut, gathered = parts_of(terms, [(2, 3, 4)] * 2), parts_of(terms, [(2, 3, 8)] * 2)
    assert cut is not None
    assert gathered is not None
    torch.testing.assert_close(torch.cat(cut, dim=-1), gathered[0])
    assert parts_of(terms, [(2, 3, 3)] * 2) is None


def test_what_is_no_linear_module_is_not_recomputed() -> None:
    assert recompute_linear(RIGHT, 0, key("block.norm output"), ALLOWED) is None
    assert recompute_linear(RIGHT, 0, key("block.down input"), ALLOWED) is None
    activated = RIGHT.reference[0].activations[key("block.down output")].relu()
    reference = replace(
        RIGHT.reference[0], activations={**RIGHT.reference[0].activations, key("block.down output"): activated}
    )
    assert recompute_linear(replace(RIGHT, reference=(reference,)), 0, key("block.down output"), ALLOWED) is None


def test_weights_are_those_that_the_step_used() -> None:
    evidence = right_evidence(steps=2)
    terms = recompute_linear(evidence, 1, key("block.down output"), ALLOWED)
    assert terms is not None
    assert torch.equal(terms.bias, evidence.reference[0].weights[BIAS])


def test_the_terms_of_an_input_gradient_add_up() -> None:
    name = key("block.up input", "backward")
    terms = recompute_input_gradient(RIGHT, 0, name, ALLOWED)
    assert terms is not None
    torch.testing.assert_close(terms.total, RIGHT.reference[0].activations[name])
    assert recompute_input_gradient(RIGHT, 0, key("block.down input", "backward"), ALLOWED) is None  # row-parallel
    assert recompute_input_gradient(RIGHT, 0, key("block.up output", "backward"), ALLOWED) is None


def compared(name: str) -> ComparedParameter:
    gradients = [rank.gradients for rank in RIGHT.candidate[0]]
    return compare_parameters(RIGHT, RIGHT.reference[0].gradients, gradients, lambda *_: ALLOWED)[0][name]


def test_a_weight_gradient_is_the_product_of_its_input_and_output_gradient() -> None:
    for name in (UP, DOWN):
        recomputed = recompute_weight_gradient(RIGHT, 0, compared(name))
        assert recomputed is not None
        torch.testing.assert_close(recomputed, tuple(rank.gradients[name] for rank in RIGHT.candidate[0]))


def test_a_weight_gradient_is_not_recomputed_over_dp_or_of_other_modules() -> None:
    assert recompute_weight_gradient(RIGHT, 0, compared(NORM)) is None
    assert recompute_weight_gradient(right_evidence(dp=2), 0, compared(UP)) is None
    unseen = with_step(RIGHT, activations={})
    assert recompute_weight_gradient(unseen, 0, compared(UP)) is None
