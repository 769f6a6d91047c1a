"""The checks before the first step: groups, shards, weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.numerics.evidence import BIAS, DOWN, NORM, UP, cause_of, right_evidence
from tpcheck.backends.layout import Layout
from tpcheck.core.causes import Cause
from tpcheck.core.placement import Shard
from tpcheck.core.topology import Topology
from tpcheck.numerics.checks.start import groups_match_topology, parameters_are_sharded, weights_match_reference
from tpcheck.numerics.evidence import Evidence, ShardFacts, SiblingWeights

RIGHT = right_evidence()


def test_declared_groups_agree() -> None:
    outcome = groups_match_topology(right_evidence(dp=2))
    assert not outcome.suspects
    assert len(outcome.margins) == 8


def test_a_live_group_that_is_not_the_declared_one_is_named_with_its_ranks() -> None:
    evidence = right_evidence(dp=2)
    facts = list(evidence.facts)
    facts[3] = replace(facts[3], group_ranks={"tp": ((1, 3),), "dp": ((1, 3),)})
    (suspect,) = groups_match_topology(replace(evidence, facts=tuple(facts))).suspects
    assert suspect.where == {"phase": "start", "field": "tp group", "ranks": [3]}
    assert suspect.evidence == {"live": [[1, 3]], "declared": [[2, 3]]}
    assert cause_of(suspect) is Cause.WRONG_GROUP


def test_shards_that_make_up_full_shapes_are_sharded() -> None:
    outcome = parameters_are_sharded(RIGHT)
    assert not outcome.suspects
    assert list(outcome.margins) == [NORM, UP, DOWN, BIAS]


def test_one_rank_has_nothing_to_shard() -> None:
    outcome = parameters_are_sharded(replace(RIGHT, topology=Topology(tp=1)))
    assert outcome.not_compared == {"parameters_are_sharded": "tp is 1: nothing to shard"}


def test_a_model_without_any_shard_is_one_finding_with_advice() -> None:
    layouts = {name: Layout.replicated(tensor.shape, 2) for name, tensor in RIGHT.initial.items()}
    (suspect,) = parameters_are_sharded(replace(RIGHT, layouts=layouts)).suspects
    assert suspect.observed == 4
    assert "partition_config" in suspect.evidence["advice"]
    assert cause_of(suspect) is Cause.NOT_SHARDED


def test_shards_that_are_too_few_are_named_with_their_sizes() -> None:
    short = Layout((8, 4), ((4, 4), (0, 4)), torch.arange(16).reshape(4, 4).repeat(2, 1).reshape(-1))
    (suspect,) = parameters_are_sharded(replace(RIGHT, layouts={**RIGHT.layouts, UP: short})).suspects
    assert suspect.parameter == UP
    assert suspect.shards == ShardFacts(0, 8, (4, 0))
    assert suspect.facts_as_evidence() == {"dim": 0, "size": 8, "shard_sizes": [4, 0]}


def with_weight(evidence: Evidence, name: str, *parts: torch.Tensor) -> Evidence:
    pairs = zip(evidence.initial_parts, parts, strict=True)
    return replace(evidence, initial_parts=tuple({**tensors, name: part} for tensors, part in pairs))


def test_equal_weights_agree_to_the_bit() -> None:
    outcome = weights_match_reference(RIGHT)
    assert not outcome.suspects
    assert set(outcome.margins.values()) == {0.0}


def test_a_wrong_weight_counts_its_elements_and_knows_its_siblings() -> None:
    first, second = (part[UP] for part in RIGHT.initial_parts)
    (suspect,) = weights_match_reference(with_weight(RIGHT, UP, second, first)).suspects
    assert (suspect.observed, suspect.allowed) == (32.0, 0.0)
    assert suspect.where == {"phase": "start", "module": "block.up", "parameter": UP, "ranks": [0, 1]}
    assert torch.equal(suspect.actual, torch.cat([second, first]))
    assert set(suspect.others) == {NORM, DOWN, BIAS}
    assert suspect.siblings is None  # nothing beside it is wrong


def test_wrong_and_right_siblings_are_told_apart() -> None:
    evidence = with_weight(RIGHT, UP, *(part[UP] + 1 for part in RIGHT.initial_parts))
    evidence = with_weight(evidence, NORM, *(part[NORM] + 1 for part in RIGHT.initial_parts))
    norm, _ = weights_match_reference(evidence).suspects
    assert norm.siblings == SiblingWeights(wrong=(UP,), right=(DOWN, BIAS))
    assert norm.facts_as_evidence() == {"beside_it": {"wrong": [UP], "right": [DOWN, BIAS]}}


def of_layout(layout: Layout) -> tuple[str | None, ShardFacts | None]:
    """Return the parameter that is incomplete with this layout of UP, and the sizes of its shards."""
    suspects = parameters_are_sharded(replace(RIGHT, layouts={**RIGHT.layouts, UP: layout})).suspects
    return (suspects[0].parameter, suspects[0].shards) if suspects else (None, None)


def test_shards_of_another_shape_than_the_parameter_are_incomplete() -> None:
    assert of_layout(Layout.from_placement((8, 4), Shard(1), 2)) == (None, None)
    assert of_layout(Layout.from_placement((4, 8), Shard(0), 2)) == (UP, ShardFacts(0, 8, (2, 2)))
    assert of_layout(Layout.from_placement((10, 4), Shard(0), 2)) == (UP, ShardFacts(0, 8, (5, 5)))
    assert of_layout(Layout.from_placement((8, 4, 1), Shard(0), 2)) == (UP, None)


def test_parameters_of_unknown_layout_are_not_counted() -> None:
    layouts = {name: RIGHT.layouts[name] for name in (NORM, DOWN, BIAS)}
    assert list(parameters_are_sharded(replace(RIGHT, layouts=layouts)).margins) == [NORM, DOWN, BIAS]


def test_a_weight_is_assembled_where_its_shards_have_the_right_shapes() -> None:
    short = with_weight(RIGHT, UP, *(part[UP][:3] for part in RIGHT.initial_parts))
    (suspect,) = weights_match_reference(short).suspects
    assert suspect.actual is None
    replicated = with_weight(RIGHT, NORM, *(part[NORM] + 1 for part in RIGHT.initial_parts))
    (suspect,) = weights_match_reference(replicated).suspects
    assert suspect.actual is None


def test_siblings_are_parameters_of_modules_of_one_parent() -> None:
    other = {"other.up.weight": torch.ones(2, dtype=torch.float64)}
    evidence = replace(
        RIGHT,
        initial={**RIGHT.initial, **other},
        layouts={**RIGHT.layouts, "other.up.weight": Layout.replicated((2,), 2)},
        initial_parts=tuple({**parts, **other} for parts in RIGHT.initial_parts),
    )
    evidence = with_weight(evidence, UP, *(part[UP] + 1 for part in RIGHT.initial_parts))
    evidence = with_weight(evidence, NORM, *(part[NORM] + 1 for part in RIGHT.initial_parts))
    norm, _ = weights_match_reference(evidence).suspects
    assert norm.siblings == SiblingWeights(wrong=(UP,), right=(DOWN, BIAS))
    for name in (DOWN, BIAS):
        evidence = with_weight(evidence, name, *(part[name] + 1 for part in RIGHT.initial_parts))
    assert all(suspect.siblings is None for suspect in weights_match_reference(evidence).suspects)
