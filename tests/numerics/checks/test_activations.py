"""Activations are compared by the placement of their parts; the first wrong module is one whose inputs agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.numerics.evidence import key as key_of
from tests.numerics.evidence import right_evidence, with_step, with_tensor
from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Partial, Replicate, Shard
from tpcheck.numerics.activation_placement import PlacedTensor
from tpcheck.numerics.checks.activations import (
    ComparedActivation,
    compare_activations,
    first_divergences,
    has_another_mistake,
    scope_of,
)
from tpcheck.numerics.differences import compare_placed
from tpcheck.numerics.evidence import Evidence, TensorKey

FORWARD = """
layers.0 in
layers.0.attn in
layers.0.attn.q in
layers.0.attn.q out
layers.0.attn.o in
layers.0.attn.o out
layers.0.attn out
layers.0.mlp in
layers.0.mlp out
layers.0 out
layers.1 in
layers.1.mlp in
layers.1.mlp out
layers.1 out
 out
""".strip("\n").splitlines()


def key(event: str, phase: str = "forward") -> TensorKey:
    module, role = event.rsplit(" ", 1)
    return TensorKey(phase, module, 0, {"in": "input", "out": "output"}[role], "0")


EVENTS = [key(event) for event in FORWARD]


@pytest.mark.parametrize(
    ("wrong", "roots", "scope"),
    [
        ([], [], None),
        (["layers.0.attn.o out", "layers.0.attn out", "layers.0 out"], ["layers.0.attn.o out"], "layers.0.attn.o"),
        (["layers.0.attn.o in", "layers.0.attn.o out", "layers.0.attn out"], ["layers.0.attn.o in"], "layers.0.attn"),
        (["layers.0.mlp out", "layers.0 out", "layers.1 in", "layers.1.mlp in", "layers.1 out", " out"],
         ["layers.0.mlp out"], "layers.0.mlp"),
        (["layers.0 out", "layers.1 in"], ["layers.0 out"], "layers.0"),
        (["layers.1 in"], ["layers.1 in"], ""),
    ],
)  # fmt: skip
def test_the_first_wrong_event_of_each_branch_is_a_root(wrong: list[str], roots: list[str], scope: str | None) -> None:
    found = first_divergences(EVENTS, {key(event) for event in wrong}.__contains__)
    assert found == [key(event) for event in roots]
    if found:
        assert scope_of(found[0], {event.module for event in EVENTS}) == scope


def test_faults_in_two_branches_are_two_roots() -> None:
    wrong = {key("layers.0.attn.q out"), key("layers.0.mlp out")}
    assert first_divergences([event for event in EVENTS if event.module.startswith("layers.0.")], wrong.__contains__)
    inside = [event for event in EVENTS if event.module in ("layers.0.attn.q", "layers.0.mlp")]
    assert first_divergences(inside, wrong.__contains__) == [key("layers.0.attn.q out"), key("layers.0.mlp out")]


def test_backward_a_module_computes_the_gradients_of_its_inputs() -> None:
    events = [key(event, "backward") for event in ("mlp out", "mlp.down out", "mlp.down in", "mlp in")]
    down = key("mlp.down in", "backward")
    assert first_divergences(events, {down, key("mlp in", "backward")}.__contains__) == [down]
    assert scope_of(down, {"mlp", "mlp.down"}) == "mlp.down"
    assert scope_of(key("mlp.down out", "backward"), {"mlp", "mlp.down"}) == "mlp"


RIGHT = right_evidence()
UP, DOWN = key_of("block.up output"), key_of("block.down output")


def test_parts_are_compared_as_replicas_or_shards_as_their_shapes_show() -> None:
    activations = compare_activations(RIGHT, 0, "forward")
    assert not activations.wrong()
    assert not activations.not_compared
    assert activations.by_key[UP].placed.placement == Shard(2, sizes=((4, 4),))
    assert activations.by_key[DOWN].placed.is_replicated
    assert set(activations.margins().values()) == {0.0}


def test_phases_are_compared_apart() -> None:
    assert {key.phase for key in compare_activations(RIGHT, 0, "backward").by_key} == {"backward"}


def test_a_wrong_part_is_wrong_at_its_key_alone() -> None:
    evidence = with_tensor(RIGHT, "activations", DOWN, lambda tensor: tensor + 1, ranks=[1])
    (wrong,) = compare_activations(evidence, 0, "forward").wrong()
    assert wrong.key == DOWN
    assert wrong.difference.wrong_tp_ranks() == (1,)


def test_what_a_rank_has_not_seen_is_not_compared() -> None:
    part = RIGHT.candidate[0][1].activations
    evidence = with_step(RIGHT, ranks=[1], activations={key: part[key] for key in part if key != UP})
    assert compare_activations(evidence, 0, "forward").not_compared == {
        "block.up: output 0": "not seen on every rank of the sharded model"
    }


def test_shapes_that_do_not_make_up_the_whole_are_not_compared() -> None:
    evidence = with_tensor(RIGHT, "activations", UP, lambda tensor: tensor[..., :3])
    assert compare_activations(evidence, 0, "forward").not_compared == {
        "block.up: output 0": "the ranks' shapes (2, 3, 3), (2, 3, 3) do not make up (2, 3, 8)"
    }


def test_a_module_that_is_called_less_often_is_not_compared() -> None:
    reference = RIGHT.reference[0]
    twice = {**reference.activations, replace(UP, call=1): reference.activations[UP]}
    evidence = replace(RIGHT, reference=(replace(reference, activations=twice),))
    reasons = compare_activations(evidence, 0, "forward").not_compared
    assert list(reasons) == ["block.up: input 0", "block.up: output 0", "block.up call 1: output 0"]
    assert all("called less often" in reason for reason in reasons.values())


def recomputed(change: float) -> Evidence:
    """Return evidence in which both ranks compute an output a second time, as activation checkpointing does."""
    parts = [rank.activations for rank in RIGHT.candidate[0]]
    evidence = RIGHT
    for rank, part in enumerate(parts):
        second = {replace(DOWN, call=1): part[DOWN] + change}
        evidence = with_step(evidence, ranks=[rank], activations={**part, **second})
    return evidence


def test_what_checkpointing_computes_again_is_compared_with_the_first_call() -> None:
    again = compare_activations(recomputed(0.0), 0, "forward").by_key[replace(DOWN, call=1)]
    assert again.is_recomputed
    assert again.difference.agrees
    assert [wrong.key.call for wrong in compare_activations(recomputed(1.0), 0, "forward").wrong()] == [1]


def test_gradients_of_a_second_call_alone_are_those_of_the_first() -> None:
    gradient = key_of("block.up input", "backward")
    evidence = RIGHT
    for rank, part in enumerate(RIGHT.candidate[0]):
        renamed = {replace(key, call=1) if key == gradient else key: part.activations[key] for key in part.activations}
        evidence = with_step(evidence, ranks=[rank], activations=renamed)
    assert compare_activations(evidence, 0, "backward").by_key[gradient].difference.agrees


def test_terms_inside_a_module_whose_result_is_right_are_summed_by_their_parent() -> None:
    evidence = with_tensor(RIGHT, "activations", DOWN, lambda tensor: tensor * 0.25, ranks=[0])
    evidence = with_tensor(evidence, "activations", DOWN, lambda tensor: tensor * 0.75, ranks=[1])
    activations = compare_activations(evidence, 0, "forward")
    assert not activations.wrong()
    assert activations.by_key[DOWN].placed.placement == Partial()


@pytest.mark.parametrize(("biases", "is_known"), [(1, True), (0, True), (1, False), (3, True)])
def test_terms_may_hold_the_bias_of_their_layer_on_each_rank_or_on_none(biases: int, is_known: bool) -> None:
    bias = torch.arange(1.0, RIGHT.reference[0].activations[DOWN].shape[-1] + 1, dtype=torch.float64)
    evidence = replace(RIGHT, initial={**RIGHT.initial, "block.down.bias": bias} if is_known else RIGHT.initial)
    for rank, share in enumerate((0.25, 0.75)):
        evidence = with_tensor(
            evidence, "activations", DOWN,
            lambda tensor, share=share: (tensor - bias) * share + biases * bias, ranks=[rank],
        )  # fmt: skip
    wrong = [] if is_known and biases < 3 else [DOWN]
    assert [activation.key for activation in compare_activations(evidence, 0, "forward").wrong()] == wrong


def test_a_shard_in_unknown_order_inside_a_right_module_is_not_compared() -> None:
    evidence = with_tensor(RIGHT, "activations", UP, lambda tensor: tensor.flip(-1))
    activations = compare_activations(evidence, 0, "forward")
    assert not activations.wrong()
    assert list(activations.not_compared) == ["block.up: output 0"]
    forced = replace(evidence, forced_inputs=frozenset([UP]))  # then the right result of the parent says nothing of it
    assert [wrong.key for wrong in compare_activations(forced, 0, "forward").wrong()] == [UP]


@pytest.mark.parametrize("change", ["flip", "terms"])
def test_inside_a_module_whose_result_is_wrong_nothing_is_reinterpreted(change: str) -> None:
    name = UP if change == "flip" else DOWN
    evidence = with_tensor(RIGHT, "activations", key_of("block output"), lambda tensor: tensor + 1)
    for rank, share in enumerate((0.25, 0.75)):
        evidence = with_tensor(
            evidence, "activations", name,
            lambda tensor, share=share: tensor.flip(-1) if change == "flip" else tensor * share, ranks=[rank],
        )  # fmt: skip
    activations = compare_activations(evidence, 0, "forward")
    assert [wrong.key for wrong in activations.wrong()] == [name, key_of("block output")]
    assert not activations.not_compared


def test_fused_blocks_inside_a_right_module_are_wrong_nevertheless() -> None:
    evidence = replace(RIGHT, layouts={**RIGHT.layouts, "block.up.weight": Layout.from_placement((8, 4), FUSED, 2)})
    assert [wrong.key for wrong in compare_activations(evidence, 0, "forward").wrong()] == [UP]


FUSED = Shard(0, blocks=2)


def test_a_second_call_is_not_judged_by_the_first_result_of_its_parent() -> None:
    evidence = RIGHT
    for rank, part in enumerate(RIGHT.candidate[0]):
        second = {replace(UP, call=1): part.activations[UP].flip(-1)}
        evidence = with_step(evidence, ranks=[rank], activations={**part.activations, **second})
    assert [wrong.key for wrong in compare_activations(evidence, 0, "forward").wrong()] == [replace(UP, call=1)]


def test_a_second_call_may_round_as_the_first() -> None:
    tolerance = replace(RIGHT.tolerance, deviations={(0, 0, DOWN): 1.0})
    assert not compare_activations(replace(recomputed(1.0), tolerance=tolerance), 0, "forward").wrong()


def test_two_calls_of_the_reference_are_compared_with_one_each() -> None:
    second = replace(DOWN, call=1)
    reference = {**RIGHT.reference[0].activations, second: RIGHT.reference[0].activations[DOWN] + 1}
    evidence = replace(recomputed(1.0), reference=(replace(RIGHT.reference[0], activations=reference),))
    evidence = with_calls_of(evidence, "block.down", 1)
    activations = compare_activations(evidence, 0, "forward")
    assert activations.by_key[second].difference.agrees
    assert not activations.by_key[second].is_recomputed


def with_calls_of(evidence: Evidence, module: str, call: int) -> Evidence:
    """Return the evidence in which every rank records the inputs of this call, too."""
    first = TensorKey("forward", module, 0, "input", "0")
    for rank, part in enumerate(evidence.candidate[0]):
        more = {replace(first, call=call): part.activations[first]}
        evidence = with_step(evidence, ranks=[rank], activations={**part.activations, **more})
    return evidence


def test_calls_that_the_reference_does_not_make_are_not_compared() -> None:
    evidence, unknown = RIGHT, TensorKey("forward", "other", 1, "output", "0")
    for rank, part in enumerate(RIGHT.candidate[0]):
        more = {replace(DOWN, call=2): part.activations[DOWN] + 1, unknown: part.activations[DOWN]}
        evidence = with_step(evidence, ranks=[rank], activations={**part.activations, **more})
    assert (
        compare_activations(evidence, 0, "forward").by_key.keys()
        == compare_activations(RIGHT, 0, "forward").by_key.keys()
    )


def test_an_output_of_a_second_call_alone_is_not_that_of_the_first() -> None:
    part = RIGHT.candidate[0][1].activations
    renamed = {replace(key, call=1) if key == DOWN else key: part[key] for key in part}
    activations = compare_activations(with_step(RIGHT, ranks=[1], activations=renamed), 0, "forward")
    assert activations.not_compared["block.down: output 0"] == "not seen on every rank of the sharded model"


def test_heads_are_cut_within_each_sample() -> None:
    """ALiBi of bloom: dim 0 counts the heads of all samples."""
    name = TensorKey("forward", "block.alibi", 0, "output", "0")
    heads = torch.arange(8.0, dtype=torch.float64).reshape(8, 1)  # two samples of four heads
    reference = RIGHT.reference[0]
    evidence = replace(RIGHT, reference=(replace(reference, activations={**reference.activations, name: heads}),))
    for rank, rows in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
        part = evidence.candidate[0][rank].activations
        evidence = with_step(evidence, ranks=[rank], activations={**part, name: heads[rows]})
    found = compare_activations(evidence, 0, "forward").by_key[name]
    assert found.difference.agrees
    assert found.placed.num_blocks == 2


def test_an_error_that_is_no_combination_of_terms_is_another_mistake() -> None:
    """Of what a sum over the ranks and something else make: a sum over fewer ranks is the sum's."""
    terms = tuple(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    expected = terms[0] + terms[1] + 1

    def made(error: torch.Tensor) -> ComparedActivation:
        placed = PlacedTensor(Replicate(), (expected + error, expected))
        return ComparedActivation(key("block out"), expected, placed, compare_placed(placed, expected, 1e-6))

    assert not has_another_mistake(made(-terms[1]), terms)
    assert not has_another_mistake(made(0.5 * terms[0] - terms[1]), terms)
    assert has_another_mistake(made(torch.ones(2, 3, 4)), terms)
    assert not has_another_mistake(made(torch.ones(2, 3, 4)), (terms[0][:1], terms[1][:1]))  # of another shape
