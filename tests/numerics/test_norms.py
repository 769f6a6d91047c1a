"""The mistake by which a norm was summed up is named, and what only looks like it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import hypot, inf, sqrt
from typing import Any

import pytest

from tests.numerics.norms import CLIPPING, LAYERS, NORMS, REPLICATED, SHARDED, clipped_alike, drawn, norms_of, step
from tpcheck.core.causes import Cause
from tpcheck.numerics.norms import GradientNorms, Matches, ObservedNorm, explain_norm, groups_with_own_norm

UP, DOWN, EMBED = "layers.0.up.weight", "layers.0.down.weight", "embed.weight"
OWN, SHARDS, ONCE = NORMS.of_ranks, NORMS.of_ranks_shards, NORMS.of_replicated
ELEMENTS = [each for of_rank in drawn() for name, each in of_rank.items() if name in SHARDED]
ELEMENTS += [drawn()[0][name] for name in sorted(REPLICATED)]


def explained(*used: float, norms: GradientNorms = NORMS, **options: Any) -> Matches:
    return explain_norm(ObservedNorm(used, norms.whole, **{"noise": 1e-14, "clipping": CLIPPING, **options}), norms)


def cause_of(*used: float, **options: Any) -> Cause | None:
    found = explained(*used, **options).explanation
    return found.cause if found else None


def test_the_whole_norm_has_every_element_once() -> None:
    assert pytest.approx(hypot(*(float(each.norm()) for each in ELEMENTS))) == NORMS.whole
    assert pytest.approx(sum(float(each.abs().sum()) for each in ELEMENTS)) == NORMS.whole_of_order(1.0)
    assert pytest.approx(max(float(each.abs().max()) for each in ELEMENTS)) == NORMS.whole_of_order(inf)


MEAN = Cause.NORM_AVERAGED_OVER_RANKS
SUM = Cause.NORM_SUMMED_OVER_RANKS
LEFT_OUT = Cause.NORM_LEAVES_OUT_SHARDS
WRONG: list[tuple[Cause, tuple[float, ...]]] = [
    (Cause.NORM_IS_LOCAL, OWN),
    (Cause.NORM_IS_LOCAL, SHARDS),
    (Cause.NORM_COUNTS_REPLICAS, (hypot(*OWN),) * 2),
    (LEFT_OUT, (OWN[1],) * 2),
    (LEFT_OUT, (SHARDS[0],) * 2),
    (LEFT_OUT, (ONCE,) * 2),
    (LEFT_OUT, (hypot(*SHARDS),) * 2),
    (MEAN, (sum(OWN) / 2,) * 2),
    (MEAN, (hypot(*OWN) / sqrt(2),) * 2),
    (MEAN, (hypot(sum(SHARDS) / 2, ONCE),) * 2),
    (MEAN, (hypot(hypot(*SHARDS) / sqrt(2), ONCE),) * 2),
    (SUM, (sum(OWN),) * 2),
    (SUM, (hypot(sum(SHARDS), ONCE),) * 2),
    (SUM, (sum(SHARDS) + ONCE,) * 2),
    (SUM, (2 * NORMS.whole,) * 2),
    (SUM, (sqrt(2) * NORMS.whole,) * 2),
    (Cause.NORM_OF_WRONG_ORDER, (NORMS.whole_of_order(1.0),) * 2),
    (Cause.NORM_OF_WRONG_ORDER, (NORMS.whole_of_order(inf),) * 2),
    (Cause.NORM_OF_WRONG_ORDER, tuple(sum(of_rank.values()) for of_rank in NORMS.of_order[1.0])),
    (Cause.NORM_OF_WRONG_ORDER, (sum(sqrt(sum(each)) for each in NORMS.squares.values()),) * 2),
    (Cause.NORM_WITHOUT_ROOT, (NORMS.whole**2,) * 2),
    (Cause.NORM_AFTER_CLIPPING, (NORMS.whole / (NORMS.whole + 1e-6),) * 2),
    (Cause.NORM_AFTER_CLIPPING, (1.0, 1.0)),
    (Cause.NORM_BEFORE_UNSCALING, (NORMS.whole * 65536,) * 2),
]


@pytest.mark.parametrize(("cause", "used"), WRONG)
def test_a_usual_mistake_is_named(cause: Cause, used: tuple[float, ...]) -> None:
    found = explained(*used).explanation
    assert found is not None
    assert found.cause is cause
    assert found.residual < 1e-12
    assert found.evidence["note"]


@pytest.mark.parametrize("norm", [sqrt(2) * hypot(*OWN), hypot(sqrt(2) * hypot(*SHARDS), ONCE)])
def test_squares_that_are_summed_over_dp_too_count_replicas(norm: float) -> None:
    found = explained(norm, norm, norms=replace(NORMS, dp=2)).explanation
    assert found is not None
    assert found.cause is Cause.NORM_COUNTS_REPLICAS
    assert "DP replicas are counted" in found.evidence["note"]
    assert cause_of(norm, norm) is None  # where there are none


@pytest.mark.parametrize(("cause", "used"), WRONG)
def test_a_number_that_is_only_near_is_not(cause: Cause, used: tuple[float, ...]) -> None:
    for factor in (1 + 1e-5, 1 - 1e-5, 1.01):
        assert cause_of(*(norm * factor for norm in used)) is None
    assert cause_of(used[0], used[1] * 1.01) is None  # nor one that is right on one rank alone


def test_the_right_norm_is_no_mistake() -> None:
    assert explained(NORMS.whole, NORMS.whole) == Matches()
    assert explained(NORMS.whole * (1 + 1e-15), NORMS.whole) == Matches()


@pytest.mark.parametrize("used", [(float("nan"),) * 2, (inf, inf), (), (1.0,)])
def test_what_is_no_norm_of_each_rank_has_no_cause(used: tuple[float, ...]) -> None:
    assert explained(*used) == Matches()


def test_a_factor_is_named_after_what_has_it() -> None:
    found = explained(*(NORMS.whole * 3,) * 2, scales={"the number of micro-batches": 3.0}).explanation
    assert found is not None
    assert (found.cause, found.evidence["note"]) == (Cause.NORM_BEFORE_UNSCALING, "times the number of micro-batches")
    assert cause_of(*(NORMS.whole * 3.5,) * 2) is None


def test_a_norm_that_two_mistakes_give_has_no_cause_and_names_both() -> None:
    """With as many replicas as TP ranks, a sum over either gives twice the norm."""
    matches = explained(*(NORMS.whole * 2,) * 2, scales={"the number of replicas": 2.0})
    assert matches.explanation is None
    assert [each.partition(":")[0] for each in matches.could_be] == [SUM.slug, Cause.NORM_BEFORE_UNSCALING.slug]


def test_a_step_alone_that_is_half_as_long_may_have_been_clipped_to_half_the_norm() -> None:
    """As where the norm that is reported is right: nothing else tells a multiple of the norm from another limit."""
    twice = explained(*(NORMS.whole * 2,) * 2, shown_by_step=True)
    assert (twice.explanation, len(twice.could_be)) == (None, 2)
    assert twice.could_be[1] == "clipped to 0.5, not to 1"
    scaled = explained(*(NORMS.whole * 4096,) * 2, scales={"the loss scale": 4096.0}, shown_by_step=True).explanation
    assert scaled is not None
    assert scaled.cause is Cause.NORM_BEFORE_UNSCALING
    local = explained(*NORMS.of_ranks, shown_by_step=True).explanation
    assert local is not None
    assert local.cause is Cause.NORM_IS_LOCAL


# ---- what is left out


def square(*names: str, ranks: tuple[int, ...] = (0, 1), norms: GradientNorms = NORMS) -> float:
    return sum(of[rank] for name in names if (of := norms.squares[name]) for rank in ranks if rank < len(of))


def left_out(*names: str, ranks: tuple[int, ...] = (0, 1), norms: GradientNorms = NORMS) -> tuple[float, ...]:
    return (sqrt(norms.whole**2 - square(*names, ranks=ranks, norms=norms)),) * norms.tp


OF_BOTH: Callable[[str], list[str]] = lambda name: [f"{layer}.{name}" for layer in LAYERS]  # noqa: E731


@pytest.mark.parametrize(
    ("names", "ranks", "note"),
    [
        ([UP], (1,), f"{UP} is counted on tp rank 0 alone"),
        ([UP], (0,), f"{UP} is left out on tp rank 0"),
        ([EMBED], (0, 1), f"{EMBED} is left out"),
        (["layers.1.norm.weight"], (0, 1), "layers.1.norm.weight is left out"),
        (OF_BOTH("q.weight"), (1,), "layers.*.q.weight is counted on tp rank 0 alone"),
        (OF_BOTH("down.bias"), (0, 1), "layers.*.down.bias is left out"),
        ([name for name in NORMS.names if name.startswith("layers.1.")], (0, 1), "layers.1.* is left out"),
        ([UP, EMBED], (1,), f"{EMBED} and {UP} is counted on tp rank 0 alone"),
        ([UP, "head.weight", "layers.1.q.weight"], (0, 1), None),
        (
            [name for name in NORMS.names if name not in OF_BOTH("q.weight")],
            (0, 1),
            "all but layers.*.q.weight is left out",
        ),
    ],
)
def test_what_a_norm_leaves_out_is_found(names: list[str], ranks: tuple[int, ...], note: str | None) -> None:
    found = explained(*left_out(*names, ranks=ranks)).explanation
    assert found is not None
    assert found.cause is LEFT_OUT
    assert (set(found.evidence["parameters"]), tuple(found.evidence["of_tp_ranks"])) == (set(names), ranks)
    if note is not None:
        assert sorted(found.evidence["note"].split()) == sorted(note.split())


def test_replicated_parameters_that_are_counted_too_often_are_found() -> None:
    names = OF_BOTH("norm.weight")
    found = explained(*(sqrt(NORMS.whole**2 + square(*names)),) * 2).explanation
    assert found is not None
    assert (found.cause, found.evidence["parameters"]) == (Cause.NORM_COUNTS_REPLICAS, names)


def test_of_four_ranks_the_one_that_counts_is_found() -> None:
    norms = norms_of(drawn(tp=4))
    found = explained(*left_out(UP, ranks=(0, 1, 3), norms=norms), norms=norms).explanation
    assert found is not None
    assert (found.evidence["parameters"], found.evidence["of_tp_ranks"]) == ([UP], [0, 1, 3])


def test_ranks_that_leave_out_different_things_have_no_cause() -> None:
    assert cause_of(left_out(UP)[0], left_out(EMBED)[0]) is None


def test_parameters_with_equal_norms_are_not_told_apart() -> None:
    by_rank = tuple({**of_rank, "head.weight": of_rank[EMBED]} for of_rank in NORMS.by_rank)
    norms = GradientNorms(by_rank, NORMS.replicated)
    matches = explained(*left_out(EMBED, norms=norms), norms=norms)
    assert matches.explanation is None
    assert len(matches.could_be) == 2


def test_a_number_that_many_sets_of_parameters_come_near_is_explained_by_none() -> None:
    """In float32 a thousand parameters leave no room for three of them."""
    many = {f"blocks.{number}.weight": 1 + number / 997 for number in range(100)}
    norms = GradientNorms((many,), frozenset())
    names = [f"blocks.{number}.weight" for number in (3, 41, 77)]
    assert cause_of(*left_out(*names, norms=norms), norms=norms, noise=1e-6) is None


# ---- clipping by groups


def test_groups_that_are_clipped_by_their_own_norms_are_found() -> None:
    groups = (SHARDED, REPLICATED)
    factors = {name: CLIPPING.factor(NORMS.norm_of(group)) for group in groups for name in group}
    found = dict(groups_with_own_norm(step(factors), NORMS))
    assert found == {group: pytest.approx(NORMS.norm_of(group)) for group in groups}
    near = {**factors, UP: factors[UP] * 1.001}
    assert not groups_with_own_norm(step(near), NORMS)


def test_a_parameter_that_shows_no_factor_is_in_the_group_that_it_completes() -> None:
    groups = (SHARDED, REPLICATED)
    factors = {name: CLIPPING.factor(NORMS.norm_of(group)) for group in groups for name in group}
    unknown = ("layers.0.norm.weight", "layers.1.down.bias", UP)
    known = {name: factor for name, factor in factors.items() if name not in unknown}
    assert {group for group, _ in groups_with_own_norm(step(known), NORMS)} == set(groups)
    larger = {name: factor for name, factor in known.items() if name in SHARDED}
    assert not groups_with_own_norm(step({**larger, "layers.1.norm.weight": 0.9}), NORMS)


def test_a_parameter_whose_gradient_is_rounding_is_in_no_group() -> None:
    """As the bias of keys, whose gradient is mathematically zero."""
    gradients = drawn()
    for of_rank in gradients:
        of_rank["layers.0.norm.weight"] = of_rank["layers.0.norm.weight"] * 1e-17
    norms = norms_of(gradients)
    own = {group: CLIPPING.factor(norms.norm_of(group)) for group in (REPLICATED, SHARDED)}
    factors = {name: own[group] for group in own for name in group if name != "layers.0.norm.weight"}
    found = groups_with_own_norm(step(factors, norms), norms)
    assert [sorted(names) for names, _ in found] == [sorted(REPLICATED - {"layers.0.norm.weight"}), sorted(SHARDED)]


def test_each_parameter_may_be_a_group() -> None:
    factors = {name: CLIPPING.factor(NORMS.norm_of([name])) for name in NORMS.names}
    assert len(groups_with_own_norm(step(factors), NORMS)) == len(NORMS.names)


def test_a_step_with_one_factor_has_no_groups() -> None:
    assert not groups_with_own_norm(clipped_alike(NORMS.whole), NORMS)
    assert clipped_alike(NORMS.whole).is_right
    assert not clipped_alike(NORMS.whole * 2).is_right


def test_ranks_with_factors_of_their_own_are_no_groups() -> None:
    own = tuple(map(CLIPPING.factor, OWN))
    assert not groups_with_own_norm(step(dict.fromkeys(NORMS.names, own)), NORMS)
    assert step(dict.fromkeys(NORMS.names, own)).is_uniform
