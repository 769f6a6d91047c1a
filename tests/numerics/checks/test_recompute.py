"""Linear modules are recomputed from each rank's inputs and weights; anything else is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.numerics.evidence import BIAS, DOWN, NORM, UP, key, right_evidence, with_step, with_tensor
from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Replicate
from tpcheck.numerics.checks.recompute import (
    compare_with_recomputed,
    parts_of,
    recompute_input_gradient,
    recompute_linear,
    recompute_weight_gradient,
)
from tpcheck.numerics.checks.suspects import ComparedParameter, compare_parameters
from tpcheck.numerics.differences import Difference
from tpcheck.numerics.evidence import Evidence, LinearTerms, Suspect, TensorKey

RIGHT = right_evidence()
UP_OUTPUT, UP_INPUT = key("block.up output"), key("block.up input")
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


def without_reference(*keys: TensorKey) -> Evidence:
    step = RIGHT.reference[0]
    kept = {each: step.activations[each] for each in step.activations if each not in keys}
    return replace(RIGHT, reference=(replace(step, activations=kept),))


def without_candidate(*keys: TensorKey) -> Evidence:
    """Return evidence in which rank 1 has not recorded these."""
    seen = RIGHT.candidate[0][1].activations
    return with_step(RIGHT, ranks=[1], activations={each: seen[each] for each in seen if each not in keys})


def without_weight(name: str) -> Evidence:
    """Return evidence in which rank 1 has no such weight."""
    first, second = RIGHT.initial_parts
    return replace(RIGHT, initial_parts=(first, {each: second[each] for each in second if each != name}))


WITHOUT_LAYOUT = replace(RIGHT, layouts={name: RIGHT.layouts[name] for name in (NORM, DOWN, BIAS)})
WITHOUT_FULL_WEIGHT = replace(RIGHT, initial={name: RIGHT.initial[name] for name in (NORM, DOWN, BIAS)})
OTHER_WEIGHT = replace(RIGHT, initial={**RIGHT.initial, UP: RIGHT.initial[UP] * 2})
CONVOLUTION = replace(RIGHT, initial={**RIGHT.initial, UP: RIGHT.initial[UP][..., None]})
NARROW_WEIGHT = replace(RIGHT, initial={**RIGHT.initial, UP: RIGHT.initial[UP][:, :3]})


@pytest.mark.parametrize(
    "evidence",
    [
        WITHOUT_LAYOUT,
        WITHOUT_FULL_WEIGHT,
        OTHER_WEIGHT,
        CONVOLUTION,
        NARROW_WEIGHT,
        without_reference(UP_INPUT),
        without_reference(UP_OUTPUT),
        without_candidate(UP_INPUT),
        without_weight(UP),
        with_tensor(RIGHT, "activations", UP_INPUT, lambda tensor: tensor[..., :2]),
    ],
)
def test_without_its_tensors_a_linear_module_is_not_recomputed(evidence: Evidence) -> None:
    assert recompute_linear(RIGHT, 0, UP_OUTPUT, ALLOWED) is not None
    assert recompute_linear(evidence, 0, UP_OUTPUT, ALLOWED) is None


def test_gradients_are_no_outputs() -> None:
    activations = {replace(each, phase="backward"): tensor for each, tensor in RIGHT.reference[0].activations.items()}
    evidence = replace(RIGHT, reference=(replace(RIGHT.reference[0], activations=activations),))
    assert recompute_linear(evidence, 0, key("block.up output", "backward"), ALLOWED) is None


def test_a_replicated_weight_gives_the_output_on_every_rank() -> None:
    layouts = {**RIGHT.layouts, UP: Layout.from_placement((8, 4), Replicate(), 2)}
    full = [{**parts, UP: RIGHT.initial[UP]} for parts in RIGHT.initial_parts]
    terms = recompute_linear(replace(RIGHT, layouts=layouts, initial_parts=tuple(full)), 0, UP_OUTPUT, ALLOWED)
    assert terms is not None
    assert not terms.are_summed
    for term in terms.by_rank:
        torch.testing.assert_close(term, RIGHT.reference[0].activations[UP_OUTPUT])


def test_the_bias_is_cut_with_the_outputs() -> None:
    bias, step = torch.arange(8.0, dtype=torch.float64), RIGHT.reference[0]
    biased = step.activations[UP_OUTPUT] + bias
    evidence = replace(
        RIGHT,
        initial={**RIGHT.initial, "block.up.bias": bias},
        initial_parts=tuple(
            {**parts, "block.up.bias": part} for parts, part in zip(RIGHT.initial_parts, bias.chunk(2), strict=True)
        ),
        reference=(replace(step, activations={**step.activations, UP_OUTPUT: biased}),),
    )
    terms = recompute_linear(evidence, 0, UP_OUTPUT, ALLOWED)
    assert terms is not None
    parts = parts_of(terms, [(2, 3, 4)] * 2)
    assert parts is not None
    torch.testing.assert_close(torch.cat(parts, dim=-1), biased)


def test_a_sum_without_a_bias_is_that_of_the_terms() -> None:
    terms = LinearTerms((torch.ones(2, 4), torch.ones(2, 4)), torch.zeros(4), (torch.ones(0),) * 2, are_summed=True)
    parts = parts_of(terms, [(2, 4)] * 2)
    assert parts is not None
    assert all(torch.equal(part, torch.full((2, 4), 2.0)) for part in parts)


def test_parts_have_the_shapes_of_all_ranks() -> None:
    terms = recompute_linear(RIGHT, 0, UP_OUTPUT, ALLOWED)
    assert terms is not None
    assert parts_of(terms, [(2, 3, 4), (2, 3, 3)]) is None
    assert parts_of(terms, [(2, 3, 4), (2, 3, 8)]) is None


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


@pytest.mark.parametrize(
    "evidence",
    [
        WITHOUT_LAYOUT,
        WITHOUT_FULL_WEIGHT,
        OTHER_WEIGHT,
        CONVOLUTION,
        without_weight(UP),
        without_reference(key("block.up output", "backward")),
        without_reference(key("block.up input", "backward")),
        without_candidate(key("block.up output", "backward")),
        replace(RIGHT, layouts={**RIGHT.layouts, UP: Layout.from_placement((8, 4), Replicate(), 2)}),
        with_tensor(RIGHT, "activations", key("block.up output", "backward"), lambda tensor: tensor[..., :3]),
        with_tensor(
            RIGHT, "activations", key("block.up output", "backward"), lambda tensor: tensor[..., :3], ranks=[1]
        ),
    ],
)
def test_without_its_tensors_an_input_gradient_is_not_recomputed(evidence: Evidence) -> None:
    assert recompute_input_gradient(evidence, 0, key("block.up input", "backward"), ALLOWED) is None


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


@pytest.mark.parametrize(
    "evidence",
    [
        without_reference(UP_INPUT),
        without_reference(key("block.up output", "backward")),
        without_candidate(UP_INPUT),
        without_candidate(key("block.up output", "backward")),
        without_weight(UP),
        with_tensor(RIGHT, "activations", UP_INPUT, lambda tensor: tensor[:1]),  # not that of the output gradient
        with_tensor(RIGHT, "activations", UP_INPUT, lambda tensor: tensor[..., :3]),  # not of the weight's shape
    ],
)
def test_without_its_tensors_a_weight_gradient_is_not_recomputed(evidence: Evidence) -> None:
    assert recompute_weight_gradient(evidence, 0, compared(UP)) is None


def test_the_gradient_of_a_weight_that_is_used_elsewhere_too_is_not_recomputed() -> None:
    parameter = compared(UP)
    assert recompute_weight_gradient(RIGHT, 0, replace(parameter, expected=parameter.expected * 2)) is None
    assert recompute_weight_gradient(RIGHT, 0, replace(parameter, expected=parameter.expected[:6])) is None
    nearly = replace(parameter, expected=parameter.expected + 1e-12)  # within ten times what is allowed
    assert recompute_weight_gradient(RIGHT, 0, nearly) is not None


def test_vectors_give_no_weight_gradient() -> None:
    evidence = RIGHT
    for each in (UP_INPUT, key("block.up output", "backward")):
        evidence = with_tensor(evidence, "activations", each, lambda tensor: tensor[0, 0])
    assert recompute_weight_gradient(evidence, 0, compared(UP)) is None


FROM_REFERENCE = Difference(1.0, 2.0, 0.5, (1.0, 0.0), 1.0, (0,), 1)


def from_recomputed(error: float, *, size: float = 1.0, is_replicated: bool = True) -> Suspect | None:
    """Compare two parts of norm `size`, of which rank 1's is off by `error`; 0.5 is allowed of a norm of 2."""
    right = torch.tensor([size, 0.0]) / 2**0.5
    parts = (right, right + torch.tensor([0.0, error]))
    return compare_with_recomputed(
        RIGHT, parts, (right, right), FROM_REFERENCE,
        check="any", kind="activation", where={"module": "block.up"}, is_replicated=is_replicated,
    )  # fmt: skip


def test_parts_may_differ_from_recomputed_ones_by_ten_times_what_is_allowed() -> None:
    assert from_recomputed(4.9) is None
    suspect = from_recomputed(5.1)
    assert suspect is not None
    assert suspect.where == {"module": "block.up", "ranks": [1]}
    assert suspect.evidence["inputs_agree"] is False
    assert suspect.allowed_error == 5.0


def test_what_is_allowed_grows_with_the_recomputed_parts() -> None:
    assert from_recomputed(9.9, size=4.0) is None
    suspect = from_recomputed(10.1, size=4.0)
    assert suspect is not None
    assert suspect.allowed_error == pytest.approx(10.0)


def test_only_replicas_are_expected_to_be_the_first_recomputed_part() -> None:
    replicas, shards = from_recomputed(9.0), from_recomputed(9.0, is_replicated=False)
    assert replicas is not None
    assert shards is not None
    assert torch.equal(replicas.expected, replicas.expected_parts[0])
    assert shards.expected is None
