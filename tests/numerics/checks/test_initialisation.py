"""Comparing models that are made from scratch, on draws made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import comb

import pytest
import torch

from tpcheck import Topology
from tpcheck.core.digests import digest
from tpcheck.core.findings import Finding
from tpcheck.numerics.checks.initialisation import (
    NUM_DRAWS,
    Draw,
    DrawnParameter,
    compare_initialisation,
)
from tpcheck.numerics.evidence import WayOutcome

TP2, DP2 = Topology(tp=2), Topology(tp=1, dp=2)
Elements = Callable[[torch.Generator], torch.Tensor]


def normal(std: float = 1.0, num_elements: int = 256) -> Elements:
    return lambda generator: std * torch.randn(num_elements, generator=generator, dtype=torch.float64)


def constant(value: float) -> Elements:
    return lambda generator: torch.full((8,), value)


def draws(elements: Elements, seed: int, *, fixed: bool = False) -> tuple[Draw, ...]:
    drawn = []
    for number in range(NUM_DRAWS):
        values = elements(torch.Generator().manual_seed(1000 * seed + (0 if fixed else number)))
        drawn.append(Draw(float(values.mean()), float(values.std(correction=0)), digest(values)))
    return tuple(drawn)


def parameter(actual: Elements, expected: Elements, seed: int = 0, **facts: bool) -> DrawnParameter:
    """Return a parameter on one rank, whose draws of the seed are its own."""
    num_elements = actual(torch.Generator()).numel()
    return DrawnParameter(facts.get("replicated", False), num_elements, draws(actual, seed), draws(expected, seed + 50))


def compare(*by_rank: DrawnParameter, topology: Topology = TP2) -> WayOutcome:
    return compare_initialisation("built", topology, [{"weight": of_rank} for of_rank in by_rank])


def only(outcome: WayOutcome) -> Finding:
    (finding,) = outcome.findings
    return finding


def test_shards_that_are_drawn_as_the_whole_is_pass() -> None:
    outcome = compare(*(parameter(normal(), normal(), rank) for rank in (1, 2)))
    assert not outcome.findings
    assert set(outcome.margins.values()) == {0.0}
    assert len(outcome.margins) == 5  # the shards, and two statistics of each rank
    assert not outcome.not_compared


def test_a_fan_of_one_shard_gives_a_factor_and_its_cause() -> None:
    finding = only(compare(*(parameter(normal(2**0.5), normal(), rank) for rank in (1, 2))))
    assert (finding.cause, finding.where["parameter"], finding.where["ranks"]) == (
        "init_depends_on_tp",
        "weight",
        [0, 1],
    )
    assert finding.evidence["ratio"] == pytest.approx(2**0.5, rel=0.05)
    assert "the root of tp" in finding.evidence["note"]
    assert (finding.evidence["count_differing"], finding.evidence["count_total"]) == (NUM_DRAWS, NUM_DRAWS)


def test_a_mean_that_moves_is_found_on_the_rank_that_has_it() -> None:
    def moved(generator: torch.Generator) -> torch.Tensor:
        return 3 + normal()(generator)

    finding = only(compare(parameter(normal(), normal(), 1), parameter(moved, normal(), 2)))
    assert (finding.cause, finding.where["ranks"]) == ("init_depends_on_tp", [1])
    assert finding.where["field"] == "mean (built)"


def test_equal_shards_are_repeated_and_equal_constants_are_not() -> None:
    same = parameter(normal(), normal(), 1)
    finding = only(compare(same, replace(same, expected=draws(normal(), 60))))
    assert (finding.cause, finding.where["ranks"]) == ("shard_repeated", [0, 1])
    assert not compare(*[parameter(constant(1.0), constant(1.0))] * 2).findings
    assert not compare(same, same).findings  # the unsharded model has equal parts, too


def test_rows_that_come_again_within_a_shard_are_those_of_another_replica() -> None:
    repeated = replace(parameter(normal(), normal(), 1), repeated_rows=(8, 0))
    finding = only(compare(repeated, repeated, topology=DP2))
    assert (finding.cause, finding.evidence["count_differing"]) == ("shard_repeated", 8)
    assert not compare(*[replace(repeated, repeated_rows=(8, 8))] * 2, topology=DP2).findings


@pytest.mark.parametrize(("topology", "axis"), [(TP2, "tp"), (DP2, "dp")])
def test_replicas_that_each_rank_drew_are_found(topology: Topology, axis: str) -> None:
    by_rank = [parameter(normal(), normal(), rank, replicated=True) for rank in (1, 2)]
    finding = only(compare(*by_rank, topology=topology))
    assert (finding.cause, finding.where["field"]) == ("replicas_drawn_apart", f"replicas over {axis} (built)")
    assert not compare(by_rank[0], by_rank[0], topology=topology).findings


def test_constants_are_compared_with_constants_and_with_draws() -> None:
    assert not compare(*[parameter(constant(1.0), constant(1.0))] * 2).findings
    for actual, expected, cause in (
        (constant(2.0), constant(1.0), "init_depends_on_tp"),
        (normal(), constant(1.0), "init_depends_on_tp"),
        (constant(0.0), normal(), "all_zero"),
    ):
        outcome = compare(*(parameter(actual, expected, rank) for rank in (1, 2)))
        assert only(outcome).cause == cause


def test_memory_that_is_no_number_is_named() -> None:
    assert only(compare(*[parameter(constant(torch.nan), normal())] * 2)).cause == "not_finite"


def test_what_the_draws_cannot_show_is_not_compared() -> None:
    few = compare(*(parameter(normal(num_elements=4), normal(num_elements=4), rank) for rank in (1, 2)))
    assert not few.findings
    assert "4 elements scatter" in few.not_compared["weight: standard deviation, rank 0, built"]
    seeded = replace(parameter(normal(), normal()), actual=draws(normal(), 3, fixed=True))
    fixed = compare(seeded, replace(seeded, actual=draws(normal(), 4, fixed=True)))
    assert not fixed.findings
    assert "seeds by itself" in fixed.not_compared["weight: mean, rank 0, built"]


def test_right_draws_of_any_distribution_are_rarely_apart() -> None:
    """A comparison fails by chance once in half of `comb(32, 16)`; here 400 are made, of skewed numbers."""
    assert comb(2 * NUM_DRAWS, NUM_DRAWS) / 2 > 3e8
    for seed in range(100):
        assert not compare(*(parameter(skewed, skewed, 100 * seed + rank) for rank in (1, 2))).findings


def skewed(generator: torch.Generator) -> torch.Tensor:
    return torch.empty(4, dtype=torch.float64).log_normal_(0, 2, generator=generator)
