"""A cause is named only where its own numbers hold."""

from typing import Any

import pytest
import torch

from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.explain import explain

EXPECTED = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
TERMS = (EXPECTED * 0.3 + 0.1, EXPECTED * 0.7 - 0.1)


def suspect(kind: str, parts: tuple[Any, ...], **others: Any) -> Suspect:
    own = tuple(EXPECTED for _ in parts)
    fields = {
        "observed": 0.7,
        "allowed": 1e-15,
        "expected": EXPECTED,
        "expected_parts": own,
        "replicated": True,
        **others,
    }
    return Suspect(check="any", where={"phase": "backward"}, kind=kind, parts=parts, **fields)


@pytest.mark.parametrize(
    ("kind", "parts", "cause"),
    [
        ("activation", TERMS, "missing_reduce"),
        ("activation", (EXPECTED * 2, EXPECTED * 2), "duplicate_reduce"),
        ("activation", (EXPECTED / 2, EXPECTED / 2), "mean_instead_of_sum"),  # equal terms were divided
        ("gradient", TERMS, "partial_gradient_on_replica"),
        ("gradient", (EXPECTED * 2, EXPECTED * 2), "gradient_scaled"),
        ("replica", TERMS, "partial_gradient_on_replica"),
        ("replica", (EXPECTED, EXPECTED + 1e-7), "replica_drift"),
        ("sharding", (), "not_sharded"),
        ("group", (), "wrong_group"),
    ],
)
def test_a_cause_whose_test_holds_is_named(kind: str, parts: tuple[Any, ...], cause: str) -> None:
    found = explain(suspect(kind, parts))
    assert found is not None
    assert found.cause.slug == cause
    assert found.error < 1e-12


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("activation", (TERMS[0], TERMS[1] + 1e-2)),  # not quite the sum
        ("gradient", (TERMS[0], TERMS[1] + 1e-2)),
        ("activation", (EXPECTED * 2, EXPECTED * 2.1)),  # not the same factor on every rank
        ("activation", (EXPECTED * 1.7, EXPECTED * 1.7)),  # a factor that tp does not explain
        ("activation", (EXPECTED[:2], EXPECTED[2:])),  # another shape
        ("gradient", (EXPECTED[:2], EXPECTED[2:])),
        ("activation", (EXPECTED * 3,)),  # one rank alone
    ],
)
def test_none_is_better_than_a_wrong_name(kind: str, parts: tuple[Any, ...]) -> None:
    assert explain(suspect(kind, parts)) is None


def test_shards_are_scaled_like_replicas() -> None:
    halves = EXPECTED.chunk(2, dim=1)
    doubled = suspect("gradient", tuple(half * 2 for half in halves), replicated=False, expected_parts=halves)
    tripled = suspect(
        "gradient", tuple(half * 3 for half in halves), replicated=False, expected_parts=halves, num_replicas=3
    )
    assert [found.cause.slug for found in (explain(doubled), explain(tripled)) if found] == [
        "gradient_scaled",
        "sum_instead_of_mean",
    ]


def test_shards_are_not_terms_of_a_sum() -> None:
    assert explain(suspect("gradient", TERMS, replicated=False)) is None


def test_a_missing_gradient_is_told_from_a_wrong_one() -> None:
    found = explain(suspect("gradient", (EXPECTED * 0, EXPECTED * 0), evidence={"missing_on_ranks": [0, 1]}))
    assert found is not None
    assert found.cause.slug == "gradient_missing"


@pytest.mark.parametrize(
    ("norms", "cause"),
    [
        ((3.0, 3.0), "norm_is_local"),
        ((3.0, 4.0), "norm_is_local"),
        ((6.0, 6.0), "norm_counts_replicas"),
        ((5.5, 5.5), None),
    ],
)
def test_the_usual_wrong_norms_are_recognised(norms: tuple[float, ...], cause: str | None) -> None:
    evidence = {"norm_of_each_rank_alone": [3.0, 4.0], "norm_with_replicas_counted": 6.0}
    found = explain(suspect("norm", norms, expected=5.0, observed=0.2, evidence=evidence))
    assert (found.cause.slug if found else None) == cause
