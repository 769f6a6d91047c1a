"""Outputs and the loss: each module that is wrong although its inputs agree is a suspect, with its facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from tests.numerics.evidence import BIAS, DOWN, UP, cause_of, key, right_evidence, with_step, with_tensor
from tpcheck.backends.layout import Layout
from tpcheck.core.causes import Cause
from tpcheck.core.placement import Placement, Replicate, Shard
from tpcheck.core.topology import Topology
from tpcheck.numerics.checks.outputs import differs_from_sibling_layers, outputs_match_reference
from tpcheck.numerics.evidence import Collective, Evidence, ForcedModules, FusedBlocks, TensorKey
from tpcheck.numerics.tolerance import Tolerance

RIGHT = right_evidence()
OUTPUT = key("block.down output")


def with_output(*factors: float, evidence: Evidence = RIGHT) -> Evidence:
    """Return evidence in which the row-parallel layer, and what follows from it, is off by a factor on each rank."""
    for rank, factor in enumerate(factors):
        for name in ("block.down output", "block output"):
            evidence = with_tensor(
                evidence, "activations", key(name), lambda tensor, by=factor: tensor * by, ranks=[rank]
            )
    return evidence


def test_every_output_and_the_loss_of_a_right_run_agree() -> None:
    outcome = outputs_match_reference(RIGHT, 0)
    assert not outcome.suspects
    assert set(outcome.margins) == {
        *(f"{module}: {role} 0" for module in ("block", "block.norm", "block.up", "block.down")
          for role in ("input", "output")),
        "loss",
    }  # fmt: skip


def test_the_first_wrong_module_is_named_and_what_follows_is_counted() -> None:
    (suspect,) = outputs_match_reference(with_output(1.0, 1.5), 0).suspects
    assert suspect.where == {
        "phase": "forward", "step": 0, "module": "block.down", "field": "output 0", "ranks": [1],
    }  # fmt: skip
    assert suspect.evidence["first_of"] == 2
    assert suspect.evidence["inputs_agree"] is True
    assert suspect.role == "output"


def test_a_linear_module_is_handed_over_with_the_terms_of_its_ranks() -> None:
    (suspect,) = outputs_match_reference(with_output(1.0, 1.5), 0).suspects
    assert suspect.linear is not None
    assert suspect.linear.are_summed
    torch.testing.assert_close(suspect.linear.total + suspect.linear.bias, suspect.expected)


def test_a_reduction_that_is_skipped_is_seen_from_the_terms() -> None:
    evidence = RIGHT
    for rank, tensors in enumerate(RIGHT.initial_parts):
        inner = RIGHT.candidate[0][rank].activations[key("block.down input")]
        term = inner @ tensors[DOWN].t() + tensors[BIAS]
        evidence = with_tensor(evidence, "activations", OUTPUT, lambda tensor, term=term: term, ranks=[rank])
    evidence = with_tensor(evidence, "activations", key("block output"), lambda tensor: tensor + 1)
    suspect, *_ = outputs_match_reference(evidence, 0).suspects
    assert cause_of(suspect) is Cause.MISSING_REDUCE


def test_an_input_that_is_wrong_though_all_before_agrees_is_laid_to_the_parent() -> None:
    evidence = with_tensor(with_output(2.0, 2.0), "activations", key("block.down input"), lambda tensor: tensor + 1)
    suspect, *_ = outputs_match_reference(evidence, 0).suspects
    assert suspect.where["module"] == "block"
    assert suspect.where["field"] == "input 0 of block.down"
    assert suspect.evidence["note"] == "the input of block.down is wrong although everything before it agrees"


def with_fused_blocks(*inputs: Tensor) -> Evidence:
    """Return a run whose ranks hold the right blocks of `block.up`, and give these inputs to `block.down`."""
    fused = Layout.from_placement((8, 4), Shard(0, blocks=2), 2)
    evidence = replace(with_output(2.0, 2.0), layouts={**RIGHT.layouts, UP: fused})
    for place, parts in (("block.up output", right_blocks()), ("block.down input", inputs)):
        for rank, part in enumerate(parts):
            evidence = with_tensor(evidence, "activations", key(place), lambda tensor, part=part: part, ranks=[rank])
    return evidence


def right_blocks() -> list[Tensor]:
    blocks = RIGHT.reference[0].activations[key("block.up output")].chunk(4, dim=-1)
    return [torch.cat([blocks[rank], blocks[2 + rank]], dim=-1) for rank in (0, 1)]


def test_a_fused_output_that_is_read_in_another_order_is_at_fault() -> None:
    suspect, *_ = outputs_match_reference(with_fused_blocks(*right_blocks()), 0).suspects
    assert suspect.where["module"] == "block.up"
    assert suspect.fused_blocks is not None
    assert suspect.fused_blocks.number == 2
    assert cause_of(suspect) is Cause.FUSED_BLOCKS_INTERLEAVED


def test_what_a_run_of_the_reference_has_shown_of_blocks_goes_first() -> None:
    read = key("block.down input")
    suspect, *_ = outputs_match_reference(
        replace(with_fused_blocks(*right_blocks()), blocks_read={read: None}), 0
    ).suspects
    assert (suspect.where["module"], suspect.fused_blocks) == ("block", None)
    plain = with_tensor(with_output(2.0, 2.0), "activations", read, lambda part: part * 1.5)
    suspect, *_ = outputs_match_reference(
        replace(plain, blocks_read={read: ("block.up", FusedBlocks(2, 0.0))}), 0
    ).suspects
    assert suspect.where["module"] == "block.up"
    assert cause_of(suspect) is Cause.FUSED_BLOCKS_INTERLEAVED


@pytest.mark.parametrize(
    "wrongly",
    [
        pytest.param(lambda right, rank: torch.cat([right[:, :1], right_blocks()[rank][:, 1:]], 1), id="one position"),
        pytest.param(lambda right, rank: right_blocks()[rank] if rank else right, id="one rank"),
        pytest.param(lambda right, rank: right / right.norm(dim=-1, keepdim=True), id="a norm over each rank's"),
        pytest.param(lambda right, rank: layer_norm(right, right.shape[-1:]), id="a LayerNorm over each rank's"),
    ],
)
def test_a_fused_output_that_is_read_in_its_order_is_not_at_fault(wrongly: Callable[[Tensor, int], Tensor]) -> None:
    right = [RIGHT.candidate[0][rank].activations[key("block.down input")] for rank in (0, 1)]
    evidence = with_fused_blocks(*(wrongly(part, rank) for rank, part in enumerate(right)))
    suspect, *_ = outputs_match_reference(evidence, 0).suspects
    assert (suspect.where["module"], suspect.fused_blocks) == ("block", None)


def test_a_fault_behind_another_one_is_found_from_the_modules_own_inputs() -> None:
    """The norm is wrong, and the row-parallel layer doubles what its wrong inputs give."""
    evidence = RIGHT
    for name in ("block.norm output", "block.up input", "block.up output", "block.down input", "block output"):
        evidence = with_tensor(evidence, "activations", key(name), lambda tensor: tensor * 3)
    bias = RIGHT.initial[BIAS]
    evidence = with_tensor(evidence, "activations", OUTPUT, lambda tensor: (tensor - bias) * 6 + bias)
    norm, down = outputs_match_reference(evidence, 0).suspects
    assert norm.where["module"] == "block.norm"
    assert down.where["module"] == "block.down"
    assert down.evidence["inputs_agree"] is False
    assert cause_of(down) is Cause.DUPLICATE_REDUCE


def test_a_leaf_behind_a_fault_is_compared_with_what_the_reference_recomputes() -> None:
    wrong = {name: (lambda tensor: tensor * 3) for name in ("block input", "block.norm input", "block.norm output")}
    evidence = RIGHT
    for name, change in wrong.items():
        evidence = with_tensor(evidence, "activations", key(name), change)
    right = tuple(rank.activations[key("block.norm output")] for rank in evidence.candidate[0])
    consistent = replace(evidence, recomputed={key("block.norm output"): right})
    names = [suspect.where["module"] for suspect in outputs_match_reference(consistent, 0).suspects]
    assert "block.norm" not in names
    other = replace(evidence, recomputed={key("block.norm output"): tuple(part * 2 for part in right)})
    names = [suspect.where["module"] for suspect in outputs_match_reference(other, 0).suspects]
    assert "block.norm" in names


def test_recomputed_leaves_are_those_of_the_first_step_and_of_the_shapes_on_the_ranks() -> None:
    wrong = {name: (lambda tensor: tensor * 3) for name in ("block input", "block.norm input", "block.norm output")}
    evidence = right_evidence(steps=2)
    for name, change in wrong.items():
        for step in (0, 1):
            evidence = with_tensor(evidence, "activations", key(name), change, step=step)
    right = tuple(rank.activations[key("block.norm output")] for rank in evidence.candidate[0])

    def modules(step: int, *parts: torch.Tensor) -> list[str]:
        compared = replace(evidence, recomputed={key("block.norm output"): parts})
        return [suspect.where["module"] for suspect in outputs_match_reference(compared, step).suspects]

    assert "block.norm" in modules(0, *(part * 2 for part in right))
    assert "block.norm" not in modules(0, *(part[:1] * 2 for part in right))
    assert "block.norm" not in modules(1, *(part * 2 for part in right))


@pytest.mark.parametrize(("loss", "margin"), [(nan, inf), (1.0, None)])
def test_a_wrong_loss_alone_is_a_suspect(loss: float, margin: float | None) -> None:
    outcome = outputs_match_reference(with_step(RIGHT, ranks=[1], loss=loss), 0)
    (suspect,) = outcome.suspects
    assert suspect.where == {"phase": "forward", "step": 0, "field": "loss", "ranks": [1]}
    assert margin is None or outcome.margins["loss"] == margin
    assert suspect.loss is not None
    assert suspect.loss.expected == RIGHT.reference[0].loss


def test_the_loss_is_handed_over_with_the_logits_where_they_are_cut() -> None:
    step = RIGHT.reference[0]
    logits = torch.randn(2, 3, 8, dtype=torch.float64)
    head = TensorKey("forward", "head", 0, "output", "0")
    evidence = replace(RIGHT, reference=(replace(step, activations={**step.activations, head: logits}),))
    for rank, part in enumerate(logits.chunk(2, dim=-1)):
        seen = evidence.candidate[0][rank].activations
        evidence = with_step(evidence, ranks=[rank], loss=7.0, activations={**seen, head: part})
    (suspect,) = outputs_match_reference(evidence, 0).suspects
    assert suspect.loss is not None
    assert torch.equal(suspect.loss.logits, logits)
    assert [tuple(part.shape) for part in suspect.loss.logits_parts] == [(2, 3, 4), (2, 3, 4)]


def with_activation(evidence: Evidence, name: TensorKey, expected: torch.Tensor, *parts: torch.Tensor) -> Evidence:
    """Return the evidence with one more activation, recorded last."""
    step = evidence.reference[0]
    reference = replace(step, activations={**step.activations, name: expected})
    evidence = replace(evidence, reference=(reference, *evidence.reference[1:]))
    for rank, part in enumerate(parts):
        seen = evidence.candidate[0][rank].activations
        evidence = with_step(evidence, ranks=[rank], activations={**seen, name: part})
    return evidence


def output_of(module: str) -> TensorKey:
    return TensorKey("forward", module, 0, "output", "0")


LOGITS = torch.arange(1.0, 49.0, dtype=torch.float64).reshape(2, 3, 8)


@pytest.mark.parametrize(
    "evidence",
    [
        with_activation(RIGHT, output_of("head"), LOGITS, LOGITS, LOGITS),  # on every rank
        with_activation(RIGHT, output_of("head"), LOGITS, *LOGITS.chunk(2, dim=1)),  # cut along the sequence
        with_activation(RIGHT, output_of("head"), LOGITS[0], *LOGITS[0].chunk(2, dim=1)),  # of two dims
        with_activation(RIGHT, output_of("head"), LOGITS, *(2 * LOGITS).chunk(2, dim=2)),  # wrong
        with_activation(RIGHT, replace(output_of("head"), role="input"), LOGITS, *LOGITS.chunk(2, dim=2)),
    ],
)
def test_other_activations_are_no_logits_that_are_cut(evidence: Evidence) -> None:
    step = evidence.reference[0]
    kept = {each: step.activations[each] for each in step.activations if each.module in ("", "head")}
    evidence = replace(evidence, reference=(replace(step, activations=kept),))
    *_, suspect = outputs_match_reference(with_step(evidence, loss=7.0), 0).suspects
    assert suspect.loss is None or suspect.loss.logits is None


def test_a_loss_of_zero_agrees_with_zero_alone() -> None:
    evidence = replace(RIGHT, reference=(replace(RIGHT.reference[0], loss=0.0),))
    right = outputs_match_reference(with_step(evidence, loss=0.0), 0)
    assert (right.margins["loss"], right.suspects) == (0.0, ())
    wrong = outputs_match_reference(with_step(with_step(evidence, loss=0.0), ranks=[1], loss=0.5), 0)
    assert wrong.margins["loss"] == inf
    (suspect,) = wrong.suspects
    assert (suspect.where["ranks"], suspect.observed, suspect.allowed) == ([1], 0.5, 0.0)


def test_the_errors_of_a_loss_are_relative() -> None:
    expected = RIGHT.reference[0].loss
    outcome = outputs_match_reference(with_step(RIGHT, ranks=[1], loss=1.5 * expected), 0)
    (suspect,) = outcome.suspects
    assert suspect.observed == pytest.approx(0.5)
    assert suspect.allowed == pytest.approx(20 * 2.0**-52)
    assert outcome.margins["loss"] == pytest.approx(suspect.observed / suspect.allowed)


def test_a_loss_that_rounds_otherwise_agrees() -> None:
    expected = RIGHT.reference[0].loss
    assert not outputs_match_reference(with_step(RIGHT, loss=expected * (1 + 15 * 2.0**-52)), 0).suspects
    assert outputs_match_reference(with_step(RIGHT, loss=expected * (1 + 30 * 2.0**-52)), 0).suspects


@pytest.mark.parametrize(
    ("module", "expected", "has_facts"),
    [("", torch.tensor(3.0), True), ("", torch.ones(2), False), ("head", torch.tensor(3.0), False)],
)
def test_a_scalar_that_the_model_returns_is_its_loss(module: str, expected: torch.Tensor, has_facts: bool) -> None:
    evidence = with_activation(RIGHT, output_of(module), expected, expected * 2, expected * 2)
    (suspect,) = outputs_match_reference(evidence, 0).suspects
    assert (suspect.loss is not None) is has_facts


def test_what_checkpointing_computes_wrongly_a_second_time_is_noted() -> None:
    note = "right when it is first computed, wrong when activation checkpointing computes it again"
    evidence = RIGHT
    for rank in (0, 1):
        seen = evidence.candidate[0][rank].activations
        second = {replace(OUTPUT, call=1): seen[OUTPUT] * 2}
        evidence = with_step(evidence, ranks=[rank], activations={**seen, **second})
    (suspect,) = outputs_match_reference(evidence, 0).suspects
    assert suspect.evidence["note"] == note
    (suspect,) = outputs_match_reference(with_output(1.0, 1.5), 0).suspects
    assert "note" not in suspect.evidence


TABLE = torch.arange(12.0, dtype=torch.float64).reshape(6, 2)


def of_embedding(placement: Placement, *parts: torch.Tensor) -> Evidence:
    """Return evidence of an embedding whose output is wrong."""
    rows = TABLE[[1, 4]]
    layouts = {**RIGHT.layouts, "embed.weight": Layout.from_placement((6, 2), placement, 2)}
    pairs = zip(RIGHT.initial_parts, parts, strict=False)
    evidence = replace(
        RIGHT,
        initial={**RIGHT.initial, "embed.weight": TABLE},
        layouts=layouts,
        initial_parts=tuple({**given, "embed.weight": part} for given, part in pairs) if parts else RIGHT.initial_parts,
    )
    return with_activation(evidence, output_of("embed"), rows, rows + 1, rows + 1)


def test_the_table_of_an_embedding_is_handed_over_where_its_rows_are_cut() -> None:
    (suspect,) = outputs_match_reference(of_embedding(Shard(0), *TABLE.chunk(2)), 0).suspects
    assert suspect.linear is None
    assert suspect.embedding is not None
    assert torch.equal(suspect.embedding.table, TABLE)
    assert [tuple(shard.shape) for shard in suspect.embedding.shards] == [(3, 2), (3, 2)]


@pytest.mark.parametrize(
    "evidence",
    [
        of_embedding(Shard(1), *TABLE.chunk(2, dim=1)),
        of_embedding(Replicate(), TABLE, TABLE),
        of_embedding(Shard(0)),  # the ranks have no such weight
        replace(of_embedding(Shard(0), *TABLE.chunk(2)), layouts=RIGHT.layouts),
        replace(of_embedding(Shard(0), *TABLE.chunk(2)), initial=RIGHT.initial),
    ],
)
def test_other_tables_are_not_handed_over(evidence: Evidence) -> None:
    (suspect,) = outputs_match_reference(evidence, 0).suspects
    assert suspect.embedding is None


def test_a_linear_module_is_no_embedding() -> None:
    evidence = RIGHT
    for name in ("block.up output", "block output"):
        evidence = with_tensor(evidence, "activations", key(name), lambda tensor: tensor * 2)
    (suspect,) = outputs_match_reference(evidence, 0).suspects
    assert suspect.where["module"] == "block.up"
    assert suspect.linear is not None
    assert suspect.embedding is None


def forced(evidence: Evidence, **outputs: Any) -> Evidence:
    """Return the evidence with a right step under teacher forcing, but for these outputs."""
    steps = [replace(rank, activations={**rank.activations, **outputs.get("wrong", {})}) for rank in RIGHT.candidate[0]]
    keys = frozenset(key for key in RIGHT.reference[0].activations if key.role == "input")
    modules = ForcedModules(RIGHT.reference[0], tuple(steps), keys, Tolerance(2.0**-52, 8, {}))
    return replace(evidence, forced_modules=modules)


def test_teacher_forcing_goes_before_the_whole_pass() -> None:
    norm = key("block.norm output")
    wrong = {norm: RIGHT.reference[0].activations[norm] * 2}
    outcome = outputs_match_reference(forced(with_output(1.5, 1.5), wrong=wrong), 0)
    assert [suspect.where["module"] for suspect in outcome.suspects] == ["block.norm"]
    assert outcome.suspects[0].evidence["isolated"] is True
    assert outcome.margins["block.norm: output 0, with teacher forcing"] > 1


def test_what_teacher_forcing_does_not_show_the_whole_pass_still_does() -> None:
    outcome = outputs_match_reference(forced(with_output(1.5, 1.5)), 0)
    assert [suspect.where["module"] for suspect in outcome.suspects] == ["block.down"]
    assert "isolated" not in outcome.suspects[0].evidence


def test_only_the_first_step_is_repeated_under_teacher_forcing() -> None:
    norm = key("block.norm output")
    evidence = forced(right_evidence(steps=2), wrong={norm: RIGHT.reference[0].activations[norm] * 2})
    assert outputs_match_reference(evidence, 0).suspects
    assert not outputs_match_reference(evidence, 1).suspects


def of_layers(*issued: tuple[Collective, ...]) -> Evidence:
    """Return evidence of four layers and ranks that issue these collectives."""
    keys = [TensorKey("forward", f"layers.{number}.down", 0, "output", "0") for number in range(4)]
    step = replace(RIGHT.reference[0], activations=dict.fromkeys(keys))
    candidate = tuple(replace(step, collectives=collectives) for collectives in issued)
    return replace(RIGHT, topology=Topology(tp=len(issued)), reference=(step,), candidate=(candidate,))


def reductions(*layers: int, ranks: tuple[int, ...] = (0, 1)) -> tuple[Collective, ...]:
    return tuple(Collective(f"layers.{layer}.down", "all_reduce", ranks) for layer in layers)


def test_a_layer_that_issues_what_its_siblings_do_does_not_differ() -> None:
    evidence = of_layers(reductions(0, 1, 2, 3), reductions(0, 1, 2, 3))
    assert differs_from_sibling_layers(evidence, 0, "layers.1.down") is None


def test_a_layer_that_issues_no_collective_differs_from_its_siblings() -> None:
    evidence = of_layers(reductions(0, 2, 3), reductions(0, 2, 3))
    found = differs_from_sibling_layers(evidence, 0, "layers.1.down")
    assert found is not None
    assert found.as_evidence() == {
        "collectives": [],
        "collectives_expected": [{"name": "all_reduce", "ranks": [0, 1]}],
        "collectives_as_in": "in layers.0.down",
    }


def test_a_layer_has_no_vote_on_itself() -> None:
    keys = [TensorKey("forward", f"layers.{number}.down", 0, "output", "0") for number in range(2)]
    evidence = of_layers(reductions(1), reductions(1))
    evidence = replace(evidence, reference=(replace(evidence.reference[0], activations=dict.fromkeys(keys)),))
    found = differs_from_sibling_layers(evidence, 0, "layers.0.down")
    assert found is not None
    assert (found.issued, found.as_in) == ((), "in layers.1.down")


def test_the_sibling_that_is_named_issues_the_collectives_of_most() -> None:
    found = differs_from_sibling_layers(of_layers(reductions(2, 3), reductions(2, 3)), 0, "layers.1.down")
    assert found is not None
    assert found.as_in == "in layers.2.down"
    found = differs_from_sibling_layers(of_layers(reductions(0, 2, 3), reductions(2, 3)), 0, "layers.1.down")
    assert found is not None
    assert found.as_in == "in layers.0.down"


def test_a_module_without_siblings_is_compared_between_the_ranks() -> None:
    head = (Collective("head", "all_gather", (0, 1)),)
    found = differs_from_sibling_layers(of_layers(head, head, ()), 0, "head")
    assert found is not None
    assert (found.issued, found.as_in) == ((), "on the other ranks")


def test_ranks_whose_groups_are_of_one_axis_issue_the_same_collectives() -> None:
    """Over DP the ranks of a TP group have groups of their own: 0 and 2, 1 and 3."""
    over_dp = [(Collective("head", "all_reduce", ranks),) for ranks in ((0, 2), (1, 3))]
    evidence = replace(of_layers(*over_dp), topology=Topology(tp=2, dp=2))
    assert differs_from_sibling_layers(evidence, 0, "head") is None
    elsewhere = replace(of_layers(over_dp[0], ()), topology=Topology(tp=2, dp=2))
    found = differs_from_sibling_layers(elsewhere, 0, "head")
    assert found is not None
    assert (found.issued, found.expected) == ((), (("all_reduce", (1, 3)),))
