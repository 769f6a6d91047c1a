"""Gradients of parameters and activations: the first wrong ones are suspects, with what explains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.numerics.evidence import BIAS, DOWN, NORM, UP, cause_of, key, right_evidence, with_step, with_tensor
from tpcheck.backends.layout import Layout
from tpcheck.core.causes import Cause
from tpcheck.numerics.checks.gradients import gradients_match_reference
from tpcheck.numerics.evidence import Collective, Evidence, ForcedModules, Suspect
from tpcheck.numerics.hypotheses import explain
from tpcheck.numerics.tolerance import Tolerance

RIGHT = right_evidence()
NAMES = tuple(f"{each.module} {each.role}" for each in RIGHT.reference[0].activations if each.phase == "forward")


def suspects(evidence: Evidence, step: int = 0) -> tuple[Suspect, ...]:
    return gradients_match_reference(evidence, step).suspects


def with_gradient(name: str, change: Callable[[torch.Tensor], torch.Tensor | None], *ranks: int) -> Evidence:
    return with_tensor(RIGHT, "gradients", name, change, ranks=ranks or (0, 1))


def test_every_gradient_of_a_right_run_agrees() -> None:
    outcome = gradients_match_reference(RIGHT, 0)
    assert not outcome.suspects
    assert {NORM, UP, DOWN, BIAS, "block.up: gradient of input 0"} <= set(outcome.margins)


def test_a_scaled_gradient_is_a_suspect_of_its_own() -> None:
    (suspect,) = suspects(with_gradient(UP, lambda gradient: gradient * 2))
    assert suspect.where == {
        "phase": "backward", "step": 0, "module": "block.up", "parameter": UP, "ranks": [0, 1]
    }  # fmt: skip
    assert suspect.evidence["inputs_agree"] is True
    assert suspect.evidence["first_of"] == 1
    assert not suspect.gradient.is_every_parameter
    assert cause_of(suspect) is Cause.GRADIENT_SCALED


def test_gradients_of_all_parameters_that_are_wrong_are_marked() -> None:
    evidence = right_evidence(dp=2)
    for name in (NORM, UP, DOWN, BIAS):
        evidence = with_tensor(evidence, "gradients", name, lambda gradient: gradient * 2)
    found = suspects(evidence)
    assert all(suspect.gradient.is_every_parameter for suspect in found)
    assert {cause_of(suspect) for suspect in found} == {Cause.SUM_INSTEAD_OF_MEAN}
    assert found[0].facts_as_evidence() == {"every_parameter": True}


def test_missing_gradients_are_one_suspect_that_names_all() -> None:
    evidence = with_gradient(NORM, lambda gradient: None, 1)
    evidence = with_tensor(evidence, "gradients", UP, lambda gradient: torch.zeros_like(gradient))
    (suspect,) = suspects(evidence)
    assert suspect.parameter == NORM
    assert suspect.gradient.missing_on == (1,)
    assert suspect.evidence["also"] == [UP]
    assert cause_of(suspect) is Cause.GRADIENT_MISSING


def test_missing_gradients_are_laid_to_where_the_backward_pass_ends() -> None:
    evidence = with_gradient(UP, lambda gradient: None)
    for rank in (0, 1):
        seen = evidence.candidate[0][rank].activations
        kept = {each: seen[each] for each in seen if each != key("block.up output", "backward")}
        evidence = with_step(evidence, ranks=[rank], activations=kept)
    (suspect,) = suspects(evidence)
    assert suspect.where["module"] == "block.up"
    assert suspect.evidence["note"] == "no gradient comes back to the output of block.up"


def test_an_output_that_no_rank_has_is_no_end_of_the_backward_pass() -> None:
    evidence = with_gradient(UP, lambda gradient: None)
    for rank in (0, 1):
        seen = evidence.candidate[0][rank].activations
        kept = {each: seen[each] for each in seen if each != key("block.up output")}
        evidence = with_step(evidence, ranks=[rank], activations=kept)
    (suspect,) = suspects(evidence)
    assert "note" not in suspect.evidence
    assert suspect.parameter == UP


def test_a_gradient_that_reentrant_checkpointing_has_in_a_second_call_is_no_end_of_the_backward_pass() -> None:
    evidence, end = with_gradient(NORM, lambda gradient: torch.zeros_like(gradient), 1), key("block output", "backward")
    for rank in (0, 1):
        seen = evidence.candidate[0][rank].activations
        renamed = {replace(each, call=1) if each == end else each: seen[each] for each in seen}
        evidence = with_step(evidence, ranks=[rank], activations=renamed)
    (suspect,) = suspects(evidence)
    assert "note" not in suspect.evidence
    assert (suspect.parameter, suspect.gradient.missing_on) == (NORM, (1,))


def test_the_backward_pass_ends_where_it_ends_on_any_rank() -> None:
    evidence = with_gradient(UP, lambda gradient: None, 1)
    seen = evidence.candidate[0][1].activations
    kept = {each: seen[each] for each in seen if each != key("block.up output", "backward")}
    (suspect,) = suspects(with_step(evidence, ranks=[1], activations=kept))
    assert suspect.evidence["note"] == "no gradient comes back to the output of block.up"
    assert (suspect.parameter, suspect.where["ranks"]) == (UP, [1])


def test_of_several_missing_gradients_one_of_the_module_where_the_backward_pass_ends_comes_first() -> None:
    evidence = with_tensor(with_gradient(NORM, lambda gradient: None), "gradients", UP, lambda gradient: None)
    for rank in (0, 1):
        seen = evidence.candidate[0][rank].activations
        kept = {each: seen[each] for each in seen if each != key("block.up output", "backward")}
        evidence = with_step(evidence, ranks=[rank], activations=kept)
    (suspect,) = suspects(evidence)
    assert suspect.where == {"phase": "backward", "step": 0, "module": "block.up", "ranks": [0, 1]}
    assert suspect.evidence["also"] == [NORM]


def test_the_first_wrong_activation_gradient_is_a_suspect_that_names_its_consequences() -> None:
    name = key("block.up input", "backward")
    evidence = RIGHT
    following = (("block.up input", "block.norm output"), ("block.norm input", "block input"))
    for each in (each for names in following for each in names):
        evidence = with_tensor(evidence, "activations", key(each, "backward"), lambda tensor: tensor * 2)
    evidence = with_tensor(evidence, "gradients", NORM, lambda gradient: gradient * 2)
    (suspect,) = suspects(evidence)
    assert suspect.kind == "input_gradient"
    assert suspect.where["module"] == "block.up"
    assert suspect.evidence["also"] == [NORM]
    assert suspect.linear is not None
    torch.testing.assert_close(suspect.linear.total, RIGHT.reference[0].activations[name])
    assert cause_of(suspect) is Cause.DUPLICATE_REDUCE


def with_wrong_backward(*names: str) -> Evidence:
    """Return evidence in which these gradients of activations are twice what they should be."""
    evidence = RIGHT
    for name in names:
        evidence = with_tensor(evidence, "activations", key(name, "backward"), lambda tensor: tensor * 2)
    return evidence


BEFORE_UP = ("block.up input", "block.norm output", "block.norm input", "block input")


def test_a_wrong_gradient_of_a_module_whose_output_gradient_is_right_is_no_consequence() -> None:
    evidence = with_wrong_backward(*BEFORE_UP)
    for name in (NORM, DOWN):
        evidence = with_tensor(evidence, "gradients", name, lambda gradient: gradient * 2)
    up, down = suspects(evidence)
    assert (up.where["module"], up.evidence["also"]) == ("block.up", [NORM])
    assert down.parameter == DOWN
    assert up.evidence["first_of"] == down.evidence["first_of"] == 6


def test_a_wrong_gradient_of_a_parameter_that_feeds_a_wrong_one_is_a_consequence() -> None:
    """As the parameter of a root, such as a table of positions, whose own output gradient is right."""
    evidence = with_tensor(with_wrong_backward(*BEFORE_UP), "gradients", BIAS, lambda gradient: gradient * 2)
    assert [suspect.parameter for suspect in suspects(evidence)] == [None, BIAS]
    uses = {BIAS: (key("block.up input"),)}
    reference = tuple(replace(step, uses=uses) for step in evidence.reference)
    (up,) = suspects(replace(evidence, reference=reference))
    assert up.evidence["also"] == [BIAS]


def test_a_wrong_gradient_of_a_module_that_ranks_do_not_call_is_a_consequence_of_what_lies_behind_it() -> None:
    """As of an embedding whose weight is used by `functional.embedding` on the ranks."""
    evidence = with_tensor(with_wrong_backward(*BEFORE_UP), "gradients", NORM, lambda gradient: gradient * 2)
    output = key("block.norm output")
    for rank in (0, 1):
        seen = evidence.candidate[0][rank].activations
        kept = {each: seen[each] for each in seen if each.module != output.module}
        evidence = with_step(evidence, ranks=[rank], activations=kept)
    flow = {"uses": {NORM: (output,)}, "sources": {key("block.up input"): (output,)}}
    without, with_flow = (
        replace(evidence, reference=tuple(replace(step, **known) for step in evidence.reference))
        for known in ({}, flow)
    )
    assert [suspect.parameter for suspect in suspects(without)] == [None, NORM]
    (up,) = suspects(with_flow)
    assert up.evidence["also"] == [NORM]


def test_a_wrong_gradient_of_a_module_whose_input_gradient_alone_is_wrong_is_no_consequence() -> None:
    evidence = with_tensor(with_wrong_backward(*BEFORE_UP), "gradients", UP, lambda gradient: gradient * 2)
    assert [suspect.where["module"] for suspect in suspects(evidence)] == ["block.up", "block.up"]


def test_behind_a_fault_an_input_gradient_is_compared_with_the_sum_of_its_own_terms() -> None:
    """The loss is off by two from the start, and the column-parallel layer forgets to sum up."""
    evidence = with_wrong_backward(*NAMES)
    terms = [
        2 * rank.activations[key("block.up output", "backward")] @ part[UP]
        for rank, part in zip(RIGHT.candidate[0], RIGHT.initial_parts, strict=True)
    ]
    for rank, term in enumerate(terms):
        evidence = with_tensor(
            evidence, "activations", key("block.up input", "backward"), lambda _, term=term: term, ranks=[rank]
        )
    first, up = suspects(evidence)
    assert first.where["module"] == ""
    assert up.where == {
        "phase": "backward", "step": 0, "module": "block.up", "field": "input 0", "ranks": [0, 1]
    }  # fmt: skip
    assert up.role == "input"
    assert up.evidence["note"] == "compared with the gradient recomputed from its output gradient and weight"
    assert cause_of(up) is Cause.MISSING_REDUCE


def test_behind_a_fault_gradients_that_their_own_tensors_give_are_not_suspects() -> None:
    evidence = with_wrong_backward(*NAMES)
    for name in (NORM, UP, DOWN, BIAS):
        evidence = with_tensor(evidence, "gradients", name, lambda gradient: gradient * 2)
    (suspect,) = suspects(evidence)
    assert suspect.evidence["also"] == [NORM, UP, DOWN, BIAS]
    assert not suspect.gradient.is_every_parameter


def test_gradients_that_are_wrong_because_outputs_are_give_one_suspect() -> None:
    evidence = with_tensor(RIGHT, "activations", key("block.norm output"), lambda tensor: tensor * 2)
    evidence = with_tensor(evidence, "gradients", NORM, lambda gradient: gradient * 2)
    evidence = with_tensor(evidence, "gradients", BIAS, lambda gradient: gradient + 1)
    (suspect,) = suspects(evidence)
    assert suspect.evidence["inputs_agree"] is False
    assert suspect.evidence["also"] == [BIAS]


def test_behind_a_fault_a_weight_gradient_is_compared_with_the_product_of_its_own_tensors() -> None:
    evidence = with_tensor(RIGHT, "activations", key("block.norm output"), lambda tensor: tensor * 2)
    evidence = with_tensor(evidence, "gradients", UP, lambda gradient: gradient * 2)
    (suspect,) = suspects(evidence)
    assert suspect.evidence["note"] == "compared with the gradient recomputed from its input and output gradient"
    assert cause_of(suspect) is Cause.GRADIENT_SCALED


@pytest.mark.parametrize(("factor", "is_own"), [(2.0, True), (4.0, True), (5.0, False)])
def test_behind_a_fault_of_one_rank_a_whole_weight_has_the_mean_or_the_sum_of_the_ranks(
    factor: float, is_own: bool
) -> None:
    whole, names = RIGHT.reference[0], ("block.up output", "block.down input")
    evidence = replace(RIGHT, layouts={**RIGHT.layouts, UP: Layout.replicated((8, 4), 2)})
    evidence = replace(evidence, initial_parts=tuple({**parts, UP: RIGHT.initial[UP]} for parts in RIGHT.initial_parts))
    for each in (key(name, phase) for name in names for phase in ("forward", "backward")):
        evidence = with_tensor(evidence, "activations", each, lambda tensor, each=each: whole.activations[each])
    for name in ("block.norm output", "block.up input"):
        evidence = with_tensor(evidence, "activations", key(name), lambda tensor: 3 * tensor, ranks=[1])
    evidence = with_tensor(evidence, "gradients", UP, lambda gradient: factor * whole.gradients[UP])
    notes = [each.evidence.get("note") for each in suspects(evidence)]
    assert ("compared with the gradient recomputed from its input and output gradient" not in notes) == is_own


def test_terms_of_a_replicated_gradient_are_partial() -> None:
    noise = torch.arange(4.0, dtype=torch.float64)
    evidence = with_gradient(NORM, lambda gradient: gradient / 2 + noise, 0)
    evidence = with_tensor(evidence, "gradients", NORM, lambda gradient: gradient / 2 - noise, ranks=[1])
    (suspect,) = suspects(evidence)
    assert cause_of(suspect) is Cause.PARTIAL_GRADIENT_ON_REPLICA


def test_the_gradient_of_another_parameter_is_recognised() -> None:
    other = RIGHT.reference[0].gradients[BIAS]
    (suspect,) = suspects(with_gradient(NORM, lambda gradient: other))
    assert set(suspect.others) == {BIAS}  # the only one that lies over the ranks as this one
    assert cause_of(suspect) is Cause.TENSOR_OF_ANOTHER_LAYER


def test_the_gradient_of_this_replica_alone_lacks_the_mean_over_dp() -> None:
    evidence = right_evidence(dp=2)
    local = evidence.reference[0].local_gradients
    for rank in (0, 1):
        part = evidence.layouts[UP].local(local[UP], rank)
        evidence = with_tensor(evidence, "gradients", UP, lambda gradient, part=part: part, ranks=[rank])
    (suspect,) = suspects(evidence)
    assert cause_of(suspect) is Cause.MISSING_REDUCE


@pytest.mark.parametrize("note", ["it is averaged over the TP group", "it is averaged over the TP group, too"])
def test_a_mean_over_the_tp_group_is_a_wrong_group(note: str) -> None:
    evidence = right_evidence(dp=2)
    step = evidence.reference[0]
    source = step.gradients if note.endswith("too") else step.local_gradients
    for name in (UP, DOWN):
        mean = sum(evidence.layouts[name].local(source[name], rank) for rank in (0, 1)) / 2
        evidence = with_tensor(evidence, "gradients", name, lambda gradient, mean=mean: mean)
    first, _ = suspects(evidence)
    assert first.gradient.is_reduced_over_tp
    found = explain(first)
    assert found is not None
    assert (found.cause, found.evidence["note"]) == (Cause.WRONG_GROUP, note)


def test_gradients_of_zeros_are_no_mean_over_the_tp_group() -> None:
    evidence = with_tensor(with_gradient(UP, torch.zeros_like), "gradients", DOWN, torch.zeros_like)
    (suspect,) = suspects(evidence)
    assert not suspect.gradient.is_reduced_over_tp


def test_gradients_that_are_equal_on_some_ranks_are_no_mean_over_the_tp_group() -> None:
    evidence = right_evidence(tp=4)
    for name in (UP, DOWN):
        evidence = with_tensor(evidence, "gradients", name, torch.ones_like, ranks=[0, 1, 2])
    assert not any(suspect.gradient.is_reduced_over_tp for suspect in suspects(evidence))


@pytest.mark.parametrize("name", [UP, DOWN])
def test_one_sharded_gradient_that_is_equal_on_all_ranks_is_no_mean_over_the_tp_group(name: str) -> None:
    (suspect,) = suspects(with_gradient(name, lambda gradient: torch.ones_like(gradient)))
    assert not suspect.gradient.is_reduced_over_tp


def test_a_weight_that_only_the_reference_ties_is_untied() -> None:
    head = torch.ones(4, dtype=torch.float64)
    evidence = with_gradient(NORM, lambda gradient: gradient - head)
    for rank in (0, 1):
        gradients = {**evidence.candidate[0][rank].gradients, "head.weight": head}
        evidence = with_step(evidence, ranks=[rank], gradients=gradients)
    (suspect,) = suspects(evidence)
    found = explain(suspect)
    assert found is not None
    assert (found.cause, found.evidence["tied_with"]) == (Cause.TIED_WEIGHT_UNTIED, "head.weight")


def forced(evidence: Evidence, name: str, change: Callable[[torch.Tensor], torch.Tensor], *ranks: int) -> Evidence:
    """Return the evidence with a gradient changed under teacher forcing."""
    steps = with_tensor(RIGHT, "gradients", name, change, ranks=ranks or (0, 1)).candidate[0]
    modules = ForcedModules(RIGHT.reference[0], steps, frozenset(), Tolerance(2.0**-52, 8, {}))
    return replace(evidence, forced_modules=modules)


def test_teacher_forcing_shows_a_gradient_that_the_whole_pass_does_not() -> None:
    (suspect,) = suspects(forced(RIGHT, UP, lambda gradient: gradient * 2))
    assert suspect.parameter == UP
    assert suspect.evidence["isolated"] is True


def test_under_teacher_forcing_terms_that_add_up_are_not_wrong() -> None:
    evidence = forced(RIGHT, NORM, lambda gradient: gradient / 2)
    assert not suspects(evidence)
    assert [suspect.parameter for suspect in suspects(forced(RIGHT, NORM, lambda gradient: gradient / 3))] == [NORM]


def test_under_teacher_forcing_gradients_of_other_shapes_are_not_compared() -> None:
    outcome = gradients_match_reference(forced(RIGHT, UP, lambda gradient: gradient[:1]), 0)
    assert not outcome.suspects
    assert f"{UP}, with teacher forcing" not in outcome.margins
    assert f"{DOWN}, with teacher forcing" in outcome.margins


def in_low_precision(evidence: Evidence) -> Evidence:
    """Return evidence of a run in which noise hides a factor in the gradients, but not under teacher forcing."""
    noise = {(0, "gradient", name): float(evidence.initial[name].norm()) for name in evidence.initial}
    right = forced(evidence, UP, lambda gradient: gradient)
    return replace(right, tolerance=Tolerance(2.0**-52, 8, noise))


def test_a_gradient_that_is_scaled_after_the_backward_pass_is_not_what_its_module_was_given() -> None:
    assert not suspects(in_low_precision(RIGHT))
    (suspect,) = suspects(in_low_precision(with_gradient(UP, lambda gradient: gradient * 1.5, 1)))
    assert (suspect.where["parameter"], suspect.where["ranks"]) == (UP, [1])
    assert "recomputed from its input and output gradient" in suspect.evidence["note"]
    everywhere = in_low_precision(with_gradient(DOWN, lambda gradient: gradient * 1.5))
    assert [cause_of(suspect) for suspect in suspects(everywhere)] == [Cause.GRADIENT_SCALED]


def test_only_the_first_step_is_repeated_under_teacher_forcing() -> None:
    evidence = replace(right_evidence(steps=2), forced_modules=forced(RIGHT, UP, torch.zeros_like).forced_modules)
    assert suspects(evidence, 0)
    assert not suspects(evidence, 1)


def test_teacher_forcing_says_nothing_of_gradients_where_an_output_is_wrong() -> None:
    evidence = forced(RIGHT, UP, lambda gradient: gradient * 2)
    assert evidence.forced_modules is not None
    outputs = with_tensor(RIGHT, "activations", key("block.norm output"), lambda tensor: tensor * 2).candidate[0]
    steps = tuple(
        replace(step, activations=wrong.activations)
        for step, wrong in zip(evidence.forced_modules.candidate, outputs, strict=True)
    )
    assert not suspects(replace(evidence, forced_modules=replace(evidence.forced_modules, candidate=steps)))


UP_INPUT = key("block.up input", "backward")
SOURCES = {key("block.up input"): (key("block.norm output"),)}
TERMS = (0.25, 0.75)


def hand_written(
    *,
    scale: float = 1.0,
    norm: float = 1.0,
    reduced: bool = True,
    terms: bool = False,
    wrong: tuple[int, ...] = (0, 1),
) -> Evidence:
    """Return evidence of a root that sums the input gradient of `up`, of which each rank has a term, before it.

    Args:
        scale: Of every gradient.
        norm: Of that of the norm's output, besides, on the wrong ranks.
        reduced: Whether a collective is issued between the two.
        terms: Whether that of the norm's output is the rank's own term, on the wrong ranks.
    """
    hidden = key("block input", "backward")
    activations = {each: tensor for each, tensor in RIGHT.reference[0].activations.items() if each != hidden}
    reference = replace(RIGHT.reference[0], activations=activations, sources=SOURCES)
    evidence = replace(RIGHT, reference=(reference,))
    for rank, term in enumerate(TERMS):
        seen = {each: tensor for each, tensor in RIGHT.candidate[0][rank].activations.items() if each != hidden}
        seen = {each: tensor * (scale if each.phase == "backward" else 1) for each, tensor in seen.items()}
        total, normed = seen[UP_INPUT], key("block.norm output", "backward")
        gradient, weight = seen[key("block.up output", "backward")], RIGHT.initial_parts[rank][UP]
        if rank in wrong:
            seen[normed] = seen[normed] * (term if terms else norm)
        seen |= {UP_INPUT: gradient @ weight if scale != 1 else total * term}
        position = list(seen).index(UP_INPUT) + 1
        issued = Collective("", "all_reduce", (0, 1), phase="backward", position=position)
        gradients = dict(RIGHT.candidate[0][rank].gradients)
        if not reduced and gradients[NORM] is not None:
            gradients[NORM] = gradients[NORM] * term  # its module has been given a term
        collectives = (issued,) if reduced else ()
        evidence = with_step(evidence, ranks=[rank], activations=seen, gradients=gradients, collectives=collectives)
    return evidence


def wrong_modules(evidence: Evidence) -> list[str]:
    return [suspect.where["module"] for suspect in suspects(evidence) if suspect.kind == "input_gradient"]


def test_terms_that_are_summed_between_modules_are_right() -> None:
    assert not suspects(hand_written())


def test_terms_behind_which_the_gradient_is_not_a_sum_are_wrong() -> None:
    assert wrong_modules(hand_written(terms=True)) == ["block.up"]


def test_terms_behind_which_ranks_have_the_same_wrong_gradient_or_one_has_the_right_one_are_summed() -> None:
    assert wrong_modules(hand_written(norm=2.0)) == ["block"]
    assert wrong_modules(hand_written(norm=2.0, wrong=(1,))) == ["block"]
    assert wrong_modules(hand_written(terms=True, wrong=(1,))) == ["block.up"]


def test_behind_another_mistake_terms_are_right_where_something_is_exchanged() -> None:
    assert wrong_modules(hand_written(scale=1.5)) == [""]
    assert wrong_modules(hand_written(scale=1.5, reduced=False)) == ["", "block.up"]


def test_behind_another_mistake_terms_are_right_where_gradients_of_parameters_are_summed() -> None:
    evidence = hand_written(scale=1.5, reduced=False)
    summed = {name: gradient for name, gradient in RIGHT.reference[0].gradients.items() if name == NORM}
    for rank in (0, 1):
        gradients = {**evidence.candidate[0][rank].gradients, **summed}
        evidence = with_step(evidence, ranks=[rank], gradients=gradients)
    assert wrong_modules(evidence) == [""]


def test_a_sum_that_lacks_a_term_on_a_rank_is_laid_to_what_does_not_come_back_there() -> None:
    hidden, normed = key("block input", "backward"), key("block.norm input", "backward")
    sources = {key("block.norm input"): (key("block input"),)}
    evidence = replace(RIGHT, reference=(replace(RIGHT.reference[0], sources=sources),))
    lacking = {each: tensor for each, tensor in RIGHT.candidate[0][1].activations.items() if each != normed}
    evidence = with_step(evidence, ranks=[1], activations=lacking)
    evidence = with_tensor(evidence, "activations", hidden, lambda gradient: gradient * 0.5 + 0.1, ranks=[1])
    (suspect,) = (each for each in suspects(evidence) if each.kind == "input_gradient")
    assert suspect.backward.lost_on == (1,)
    assert suspect.evidence["note"] == "no gradient comes back to input 0 of block.norm on rank 1"


def test_a_wrong_gradient_that_a_module_receives_is_laid_to_what_stands_behind_it() -> None:
    sources = {key("block output"): (key("block.down output"),)}
    evidence = replace(RIGHT, reference=(replace(RIGHT.reference[0], sources=sources),))
    output = key("block.down output", "backward")
    evidence = with_tensor(evidence, "activations", output, lambda gradient: gradient * 1.5)
    (suspect,) = (each for each in suspects(evidence) if each.kind == "input_gradient")
    assert suspect.evidence["note"] == (
        "the gradients before it agree: wrong is the backward of what stands between block.down and block"
    )


def with_head(change: Callable[[torch.Tensor], torch.Tensor], *unseen: str) -> Evidence:
    """Return evidence of a head behind the block, in which what `block.down` receives backward is wrong.

    Args:
        change: What the head sends back is this of what it should be.
        unseen: Gradients that rank 1 has not recorded.
    """
    sent = key("head input", "backward")
    sources = {key("head input"): (key("block output"),), key("block output"): (key("block.down output"),)}
    reference = RIGHT.reference[0]
    activations = {sent: reference.activations[key("block output", "backward")], **reference.activations}
    evidence = replace(RIGHT, reference=(replace(reference, activations=activations, sources=sources),))
    for rank in (0, 1):
        seen = {sent: change(activations[sent]), **RIGHT.candidate[0][rank].activations}
        seen = {each: tensor for each, tensor in seen.items() if each not in [key(name, "backward") for name in unseen]}
        evidence = with_step(evidence, ranks=[rank], activations=seen)
    output = key("block.down output", "backward")
    return with_tensor(evidence, "activations", output, lambda gradient: gradient * 1.5)


def test_a_gradient_that_is_not_compared_does_not_agree() -> None:
    wrong = with_head(lambda gradient: gradient * 1.5, "block output")
    assert [(each.where["module"], each.where["field"]) for each in suspects(wrong)] == [("head", "input 0")]


def test_where_the_nearest_compared_gradients_agree_what_stands_before_them_is_wrong() -> None:
    (suspect,) = suspects(with_head(lambda gradient: gradient, "block output"))
    assert suspect.where["field"] == "output 0 of block.down"
    assert suspect.evidence["note"] == (
        "the gradients before it agree: wrong is the backward of what stands between block.down and head"
    )


def test_no_gradient_is_said_to_agree_where_none_was_compared() -> None:
    (suspect,) = suspects(with_head(lambda gradient: gradient, "block output", "head input"))
    assert suspect.evidence["note"] == (
        "no gradient before it was compared: wrong is the backward of what stands behind block.down"
    )
