"""Whether models that are made from scratch under tensor parallelism are drawn as the unsharded model is.

Weights that are drawn anew can only be compared by what draws of many seeds have in common. Each parameter's mean and
standard deviation on a rank differ from the unsharded model's in the same elements where all draws of one side lie
above all draws of the other. If both sides draw alike, all orders of the draws are equally likely, whatever the
distribution: with 16 draws a side a comparison then fails by chance once in `comb(32, 16) / 2`, 3e8, times.

Exact: shards of one parameter that are equal on two ranks, and replicas that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import exp, inf, isclose, isfinite, log
from typing import Any, Literal

from tpcheck.core.causes import Cause
from tpcheck.core.check_names import INITIALISATION_CHECK
from tpcheck.core.findings import Finding
from tpcheck.core.topology import Topology
from tpcheck.numerics.evidence import WayOutcome

NUM_DRAWS = 16
"""Draws of each side: 200 parameters on four ranks, with two statistics each, alarm falsely once in 2e5 runs."""


@dataclass(frozen=True, slots=True)
class Draw:
    """The elements that one rank holds of a parameter, under one seed.

    Attributes:
        mean, std: Of the elements; the standard deviation is 0 where all are equal.
        digest: Of their bits.
    """

    mean: float
    std: float
    digest: str


@dataclass(frozen=True, slots=True)
class DrawnParameter:
    """A parameter on one rank.

    Attributes:
        is_replicated: Whether every rank of the TP group holds all of it.
        num_elements: How many elements this rank holds.
        actual: Of the sharded model, by seed.
        expected: The same elements of the unsharded model, by other seeds.
        repeated_rows: How many rows or columns of the first draw equal an earlier one: in the sharded model, and in the
            unsharded one; None where rows are too short to tell.
    """

    is_replicated: bool
    num_elements: int
    actual: tuple[Draw, ...]
    expected: tuple[Draw, ...]
    repeated_rows: tuple[int, int] | None = None


DrawnModel = Mapping[str, DrawnParameter]  # by name, on one rank


@dataclass(frozen=True, slots=True)
class _Difference:
    """One comparison of a parameter that failed on some ranks; `kind` says what was compared."""

    parameter: str
    kind: str
    ranks: tuple[int, ...]
    count: int
    counted: tuple[str, str, str]
    total: int | None
    cause: Cause | None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mistake(self) -> tuple[Any, ...]:
        """What findings of one mistake have in common."""
        return self.kind, self.ranks, self.cause, self.evidence.get("note")


def compare_initialisation(way: str, topology: Topology, by_rank: Sequence[DrawnModel]) -> WayOutcome:
    """Compare the draws of all ranks.

    Args:
        way: How the model is made, for names.
        by_rank: What each rank holds, by global rank.
    """
    outcome = WayOutcome()
    differences: list[_Difference] = []
    for name in by_rank[0]:
        drawn = [model[name] for model in by_rank]
        for label, found in (*_compare_replicas(name, topology, drawn), *_compare_shards(name, topology, drawn)):
            outcome.margins[f"{name}: {label}, {way}"] = 0.0 if found is None else inf
            differences += [] if found is None else [found]
        for statistic in _STATISTICS:
            differences += _compare_statistic(name, statistic, drawn, way, outcome, topology)
    return replace(outcome, findings=tuple(_findings(way, differences)))


def _findings(way: str, differences: Sequence[_Difference]) -> Iterator[Finding]:
    by_mistake: dict[tuple[Any, ...], list[_Difference]] = {}
    for difference in differences:
        by_mistake.setdefault(difference.mistake, []).append(difference)
    for first, *others in by_mistake.values():
        evidence: dict[str, Any] = {"counted": first.counted, "count_differing": first.count, **first.evidence}
        if first.total is not None:
            evidence["count_total"] = first.total
        if first.cause is not None and (advice := first.cause.advise()) is not None:
            evidence.setdefault("advice", advice)
        if others:
            evidence["also"] = [other.parameter for other in others]
        where = {
            "phase": "initialised",
            "parameter": first.parameter,
            "field": f"{first.kind} ({way})",
            "ranks": list(first.ranks),
        }
        cause = None if first.cause is None else first.cause.slug
        yield Finding(INITIALISATION_CHECK, where, float(first.count), 0.0, cause, evidence)


# ---- replicas and shards: exact


def _compare_replicas(
    name: str, topology: Topology, drawn: Sequence[DrawnParameter]
) -> Iterator[tuple[str, _Difference | None]]:
    """Compare what ranks should hold alike: replicas over TP, and each shard over DP."""
    for axis in ("tp", "dp"):
        if topology.sizes[axis] == 1 or (axis == "tp" and not drawn[0].is_replicated):
            continue
        differing = {
            group: sum(len({drawn[rank].actual[number].digest for rank in group}) > 1 for number in _numbers(drawn))
            for group in topology.groups(axis)
        }
        ranks = tuple(sorted(rank for group, count in differing.items() if count for rank in group))
        is_random = all(draw.std > 0 for rank in ranks for draw in drawn[rank].actual)
        yield (
            f"replicas over {axis}",
            None
            if not ranks
            else _Difference(
                name,
                f"replicas over {axis}",
                ranks,
                max(differing.values()),
                _COUNTED_DRAWS,
                len(drawn[0].actual),
                Cause.REPLICAS_DRAWN_APART if is_random else None,
            ),
        )


_COUNTED_DRAWS = ("draw", "differs", "differ")


def _numbers(drawn: Sequence[DrawnParameter]) -> range:
    return range(len(drawn[0].actual))


def _compare_shards(
    name: str, topology: Topology, drawn: Sequence[DrawnParameter]
) -> Iterator[tuple[str, _Difference | None]]:
    """Look for shards that are equal on several ranks of a group, and rows that come again within a shard."""
    if topology.tp > 1 and not drawn[0].is_replicated:
        equal = sorted(
            {
                rank
                for group in topology.groups("tp")
                for pair in combinations(group, 2)
                if _are_equal(*(drawn[rank] for rank in pair))
                for rank in pair
            }
        )
        yield (
            "shards",
            None
            if not equal
            else _Difference(
                name,
                "shards",
                tuple(equal),
                len(drawn[0].actual),
                ("draw", "has equal shards", "have equal shards"),
                len(drawn[0].actual),
                Cause.SHARD_REPEATED,
                {"advice": _ADVICE_REPEATED},
            ),
        )
    rows = {rank: of_rank.repeated_rows for rank, of_rank in enumerate(drawn) if of_rank.repeated_rows is not None}
    if topology.dp > 1 and rows:  # gathered over DP
        repeating = {rank: actual for rank, (actual, expected) in rows.items() if actual > expected}
        yield (
            "rows",
            None
            if not repeating
            else _Difference(
                name,
                "rows",
                tuple(repeating),
                max(repeating.values()),
                ("row or column", "equals an earlier one", "equal earlier ones"),
                None,
                Cause.SHARD_REPEATED,
                {"advice": _ADVICE_REPEATED},
            ),
        )


_ADVICE_REPEATED = (
    "Ranks of one seed that draw their own shards draw the same ones: seed the generator that draws shards with seed + "
    "tp_rank (that of replicas with the seed alone), or draw the whole tensor on all ranks and keep the rank's part."
)


def _are_equal(rank_a: DrawnParameter, rank_b: DrawnParameter) -> bool:
    """Return whether two ranks' shards are the same in each draw, and should not be."""
    are_equal = all(a.digest == b.digest and a.std > 0 for a, b in zip(rank_a.actual, rank_b.actual, strict=True))
    return are_equal and any(a.digest != b.digest for a, b in zip(rank_a.expected, rank_b.expected, strict=True))


# ---- statistics


@dataclass(frozen=True, slots=True)
class _Statistic:
    """A number of each draw.

    Attributes:
        name: For labels.
        of: The number; None where the draw has none.
        scale: Whether sizes are compared by their ratio.
    """

    name: str
    of: Callable[[Draw], float | None]
    scale: bool = False


_STATISTICS = (
    _Statistic("standard deviation", lambda draw: log(draw.std) if draw.std > 0 else None, scale=True),
    _Statistic("mean", lambda draw: draw.mean),
)


@dataclass(frozen=True, slots=True)
class _Compared:
    """The comparison of a statistic on one rank: `evidence` where the two sides differ, `reason` where unknown."""

    evidence: Mapping[str, Any] | None = None
    reason: str | None = None
    cause: Cause | None = None


def _compare_statistic(
    name: str,
    statistic: _Statistic,
    drawn: Sequence[DrawnParameter],
    way: str,
    outcome: WayOutcome,
    topology: Topology,
) -> list[_Difference]:
    compared = [_compare_draws(statistic, of_rank, topology.tp) for of_rank in drawn]
    for rank, of_rank in enumerate(compared):
        label = f"{name}: {statistic.name}, rank {rank}, {way}"
        if of_rank is not None and of_rank.reason is not None:
            outcome.not_compared[label] = of_rank.reason
        elif of_rank is not None:
            outcome.margins[label] = 0.0 if of_rank.evidence is None else inf
    wrong = {rank: found for rank, found in enumerate(compared) if found is not None and found.evidence is not None}
    if not wrong:
        return []
    ranks, first = tuple(wrong), next(iter(wrong.values()))
    total = len(drawn[0].actual)
    outside = "outside of what the unsharded model draws"
    counted = ("draw", f"lies {outside}", f"lie {outside}")
    return [_Difference(name, statistic.name, ranks, total, counted, total, first.cause, first.evidence or {})]


def _compare_draws(statistic: _Statistic, drawn: DrawnParameter, tp: int) -> _Compared | None:
    """Compare one rank's draws; None where they have no such statistic."""
    if not all(isfinite(draw.mean) and isfinite(draw.std) for draw in drawn.actual):
        evidence = {"note": "some elements are infinite or not a number"}
        return None if statistic.scale else _Compared(evidence, cause=Cause.NOT_FINITE)
    kinds = [_kind(side) for side in (drawn.actual, drawn.expected)]
    if kinds != ["drawn", "drawn"]:
        return None if statistic.scale else _compare_constants(drawn, *kinds)
    sides = [[statistic.of(draw) for draw in draws] for draws in (drawn.actual, drawn.expected)]
    actual, expected = ([value for value in side if value is not None] for side in sides)
    if len(actual) < len(drawn.actual) or len(expected) < len(drawn.expected):
        return None  # one element has no standard deviation
    if min(actual) > max(expected) or max(actual) < min(expected):
        return _Compared(_evidence(statistic, actual, expected, tp), cause=Cause.INIT_DEPENDS_ON_TP)
    if statistic.scale and _spread(actual) + _spread(expected) > log(_least_factor(tp)):
        text = f"draws of {drawn.num_elements} elements scatter more than by a factor of {_least_factor(tp):.3g}"
        return _Compared(reason=text)
    return _Compared()


def _kind(draws: Sequence[Draw]) -> Literal["drawn", "constant", "fixed"]:
    """Return whether each seed gives other values, all one and the same number, or neither."""
    digests = {draw.digest for draw in draws}
    if len(digests) == len(draws):
        return "drawn"
    return "constant" if len(digests) == 1 and draws[0].std == 0 else "fixed"


def _compare_constants(drawn: DrawnParameter, actual_kind: str, expected_kind: str) -> _Compared:
    """Compare a parameter that some side does not draw anew under each seed."""
    if {draw.digest for draw in drawn.actual} == {draw.digest for draw in drawn.expected}:
        return _Compared()
    if "fixed" in (actual_kind, expected_kind):
        return _Compared(reason="some seeds give the same values: the code that draws them seeds by itself")
    evidence = {
        "sharded": _described(drawn.actual[0], actual_kind),
        "unsharded": _described(drawn.expected[0], expected_kind),
    }
    is_zero = actual_kind == "constant" and not drawn.actual[0].mean
    return _Compared(evidence, cause=Cause.ALL_ZERO if is_zero else Cause.INIT_DEPENDS_ON_TP)


def _described(draw: Draw, kind: str) -> str:
    return f"all {draw.mean:.3g}" if kind == "constant" else f"random, of standard deviation {draw.std:.3g}"


def _least_factor(tp: int) -> float:
    """Return the factor of a fan that is counted on one rank."""
    return float(max(tp, 2) ** 0.5)


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2


def _evidence(statistic: _Statistic, actual: Sequence[float], expected: Sequence[float], tp: int) -> dict[str, Any]:
    means = [sum(side) / len(side) for side in (actual, expected)]
    if not statistic.scale:
        return {"mean": means[0], "mean_unsharded": means[1]}
    ratio = exp(means[0] - means[1])
    evidence: dict[str, Any] = {"std": exp(means[0]), "std_unsharded": exp(means[1]), "ratio": ratio}
    for text, factor in (("the root of tp", tp**0.5), ("tp", float(tp)), ("1 over the root of tp", tp**-0.5)):
        if tp > 1 and isclose(log(ratio), log(factor), abs_tol=_spread(actual) + _spread(expected), rel_tol=0.0):
            return {**evidence, "note": f"the ratio is {text}: a fan, or a number of elements, was counted on one rank"}
    return evidence
