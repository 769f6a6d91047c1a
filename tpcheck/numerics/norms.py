"""Which wrong norm of the gradients a number is: that of one rank, with replicas counted, without some shards, ...

All that is needed are norms of each parameter's gradient on each rank, so that `verify` and `compare` share it. A
mistake is named where the norm that it gives is the actual one, and no simpler mistake, nor another one, gives that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations
from math import hypot, inf, isfinite, sqrt
from typing import Any

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.clipping import EPSILONS, NO_CLIPPING, Clipping
from tpcheck.numerics.tolerance import (
    FITTED_RELATIVE_ERROR,
    MOST_CHANCE,
    MOST_NAMES_IN_TRIPLES,
    MOST_UNKNOWN_FACTORS,
    RESIDUAL_NOISY,
    WINDOW_OF_CHANCE,
)

LOSS_SCALE = "the loss scale"
NORM_CAUSES = frozenset(
    cause.slug
    for cause in (
        Cause.NORM_IS_LOCAL,
        Cause.NORM_COUNTS_REPLICAS,
        Cause.NORM_LEAVES_OUT_SHARDS,
        Cause.NORM_AVERAGED_OVER_RANKS,
        Cause.NORM_SUMMED_OVER_RANKS,
        Cause.NORM_OF_WRONG_ORDER,
        Cause.NORM_WITHOUT_ROOT,
        Cause.NORM_BEFORE_UNSCALING,
        Cause.NORM_AFTER_CLIPPING,
    )
)


@dataclass(frozen=True)
class GradientNorms:
    """Norms of the gradients that the ranks of one TP group hold, before clipping.

    Attributes:
        by_rank: Of each parameter's gradient on each rank: by_rank[tp_rank][name].
        replicated: Names of the parameters that every rank holds whole; of the others each rank holds a shard.
        of_order: The same as `by_rank` for norms of other orders: 1, the sum of absolute values, and inf, the largest.
        kinds: Sets of parameters that a loop may treat otherwise, such as vectors and matrices, by their description.
        dp: How many DP ranks hold the same.
    """

    by_rank: tuple[Mapping[str, float], ...]
    replicated: frozenset[str]
    of_order: Mapping[float, tuple[Mapping[str, float], ...]] = field(default_factory=dict)
    kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)
    dp: int = 1

    @property
    def tp(self) -> int:
        return len(self.by_rank)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for of_rank in self.by_rank for name in of_rank))

    @cached_property
    def squares(self) -> Mapping[str, tuple[float, ...]]:
        """The squares that the right sum has, by name and tp_rank; a replicated parameter has one."""
        return {name: self._squares(name) for name in self.names}

    def _squares(self, name: str) -> tuple[float, ...]:
        norms = [of_rank.get(name, 0.0) for of_rank in self.by_rank]
        return (max(norms) ** 2,) if name in self.replicated else tuple(norm**2 for norm in norms)

    def norm_of(self, names: Iterable[str]) -> float:
        """Return the norm of some parameters' gradients, every element counted once."""
        return sqrt(sum(sum(self.squares[name]) for name in names if name in self.squares))

    @cached_property
    def whole(self) -> float:
        """Over every element once: the right norm."""
        return self.norm_of(self.names)

    @cached_property
    def of_ranks(self) -> tuple[float, ...]:
        """Over all that each rank holds, by tp_rank."""
        return tuple(hypot(*of_rank.values()) for of_rank in self.by_rank)

    @cached_property
    def of_ranks_shards(self) -> tuple[float, ...]:
        """Over each rank's shards alone, by tp_rank."""
        return tuple(
            hypot(*(norm for name, norm in of_rank.items() if name not in self.replicated)) for of_rank in self.by_rank
        )

    @cached_property
    def of_replicated(self) -> float:
        """Over the parameters that all ranks hold, each counted once."""
        return self.norm_of(self.replicated)

    @cached_property
    def counting_replicas(self) -> float:
        """Over all ranks, with replicated parameters counted once for each rank."""
        return hypot(*self.of_ranks)

    @cached_property
    def left_out(self) -> Sequence[_Set]:
        """What a norm may leave out, by patterns of names."""
        return list(_sets(self))

    @cached_property
    def counted_often(self) -> Sequence[_Set]:
        """What a norm may count once for each rank, by patterns of names."""
        return list(_replicas(self))

    def whole_of_order(self, order: float) -> float:
        by_rank = self.of_order[order]
        shards = [norm for of_rank in by_rank for name, norm in of_rank.items() if name not in self.replicated]
        replicas = [max(of_rank.get(name, 0.0) for of_rank in by_rank) for name in self.replicated]
        return max([*shards, *replicas], default=0.0) if order == inf else sum(shards) + sum(replicas)


@dataclass(frozen=True, slots=True)
class ObservedNorm:
    """A norm that is wrong, and what it is compared with.

    Attributes:
        used: The norm on each rank, by tp_rank.
        expected: The right norm.
        noise: Relative error by which two computations of one norm differ.
        tolerance: Relative error up to which two norms may be the same number.
        least: Norms below it cannot be distinguished from it: gradients of smaller norms are not clipped.
        scales: Numbers by which gradients are multiplied before they are unscaled, by what they are.
        clipping: How the step was clipped.
        unit: By how much larger gradients were when the norm was taken; 0 where that is unknown.
        shown_by_step: Whether the step alone shows it: the norm that is reported is right, or none is.
    """

    used: tuple[float, ...]
    expected: float
    noise: float = FITTED_RELATIVE_ERROR
    tolerance: float = FITTED_RELATIVE_ERROR
    least: float = 0.0
    scales: Mapping[str, float] = field(default_factory=dict)
    clipping: Clipping = NO_CLIPPING
    unit: float = 1.0
    shown_by_step: bool = False

    @property
    def is_wrong(self) -> bool:
        """Whether there is a wrong number on some rank, and not only such as any small norm looks like."""
        numbers_exist = bool(self.used) and all(map(isfinite, self.used)) and isfinite(self.expected)
        is_small = self.least > 0 and all(used <= self.least * (1 + self.tolerance) for used in self.used)
        return numbers_exist and not is_small and self.error_of((self.expected,) * len(self.used), self.noise) is None

    def error_of(self, predicted: Sequence[float], tolerance: float) -> float | None:
        """Return the largest relative error of what is predicted for each rank; None where it is not the norm used."""
        worst = 0.0
        for used, norm in zip(self.used, predicted, strict=True):
            seen = max(norm, self.least)
            error = abs(max(used, self.least) - seen)
            if not error <= tolerance * seen:
                return None
            worst = max(worst, error / seen if seen else 0.0)
        return worst

    def explained_error(self, predicted: Sequence[float], tolerance: float) -> float | None:
        """Return the error of what a mistake predicts, where it explains the difference from the right norm, too."""
        error = self.error_of(predicted, tolerance)
        if error is None or self.error_of(predicted, 0.0) == 0.0:
            return error
        for used, norm in zip(self.used, predicted, strict=True):
            difference = abs(max(used, self.least) - max(self.expected, self.least))
            is_right = difference <= tolerance * self.expected
            if not is_right and abs(max(used, self.least) - max(norm, self.least)) > RESIDUAL_NOISY * difference:
                return None
        return error


@dataclass(frozen=True, slots=True)
class Mistake:
    """A way to sum up a norm, and the norm that it gives.

    Attributes:
        cause: Its name.
        predicted: The norm on each rank, by tp_rank.
        evidence: Which parameters, ranks, order or factor it is about, by name, JSON-able.
        times: By what it multiplies the right norm, where that is a number of ranks, replicas or micro-batches: a step
            that was clipped to another largest norm looks the same. 0 for any other mistake.
    """

    cause: Cause
    predicted: tuple[float, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    times: float = 0.0


@dataclass(frozen=True, slots=True)
class Matches:
    """What a norm may be.

    Attributes:
        explanation: The one mistake that gives it; None where there is none, or several do.
        could_be: What it could be, where several mistakes give it.
    """

    explanation: Explanation | None = None
    could_be: tuple[str, ...] = ()


def explain_norm(observed: ObservedNorm, norms: GradientNorms, *, search: bool = True) -> Matches:
    """Return by which mistake the norm was summed up: the simplest that gives it, if no other as simple one does.

    Args:
        search: Also look for parameters and ranks that are left out or counted too often.
    """
    if not observed.is_wrong or len(observed.used) != norms.tp or not norms.names:
        return Matches()
    for mistakes in _by_simplicity(observed, norms):
        found = [
            (mistake, error)
            for mistake in mistakes
            if not _is_right(observed, mistake)
            and (error := observed.explained_error(mistake.predicted, observed.tolerance)) is not None
        ]
        if found:
            return _named(found, observed)
    return _selected(observed, norms) if search else Matches()


def _is_right(observed: ObservedNorm, mistake: Mistake) -> bool:
    """Return whether a mistake gives the right norm, as counting replicas does where there are none."""
    return all(abs(norm - observed.expected) <= observed.tolerance * observed.expected for norm in mistake.predicted)


def _named(found: Sequence[tuple[Mistake, float]], observed: ObservedNorm) -> Matches:
    causes = {mistake.cause for mistake, _ in found}
    mistake, error = min(found, key=lambda each: each[1])
    limit = observed.clipping.max_norm
    rivals = [f"clipped to {limit / mistake.times:.3g}, not to {limit:.3g}"] if mistake.times else []
    if len(causes) == 1 and not (rivals and observed.shown_by_step):
        return Matches(Explanation(mistake.cause, error, mistake.evidence))
    named = [f"{each.cause.slug}: {each.evidence.get('note', '')}" for each, _ in found]
    return Matches(could_be=(*named, *(rivals if observed.shown_by_step else ())))


def _by_simplicity(observed: ObservedNorm, norms: GradientNorms) -> Iterator[list[Mistake]]:
    """Yield mistakes about all parameters, the simplest first; those of one list are as simple."""
    tp, whole, of_ranks, of_shards = norms.tp, norms.whole, norms.of_ranks, norms.of_ranks_shards
    replicated, shards = norms.of_replicated, hypot(*of_shards)

    def everywhere(cause: Cause, norm: float, note: str, times: float = 0.0, **evidence: Any) -> Mistake:
        return Mistake(cause, (norm,) * tp, {"note": note, **evidence}, times)

    yield [
        Mistake(Cause.NORM_IS_LOCAL, of_ranks, {"note": "each rank's norm is that of its own gradients"}),
        Mistake(Cause.NORM_IS_LOCAL, of_shards, {"note": "each rank's norm is that of its own shards"}),
        Mistake(
            Cause.NORM_IS_LOCAL,
            (*of_ranks[:1], *of_shards[1:]),
            {"note": "each rank's norm is its own; that of tp rank 0 alone has the replicated parameters"},
        ),
        everywhere(
            Cause.NORM_COUNTS_REPLICAS, norms.counting_replicas, "all replicated parameters are counted by each rank"
        ),
        *_over_the_world(norms),
    ]
    yield [
        *(
            everywhere(Cause.NORM_LEAVES_OUT_SHARDS, norm, f"it is that of {what} of tp rank {number} alone")
            for of_each, what in ((of_ranks, "the gradients"), (of_shards, "the shards"))
            for number, norm in enumerate(of_each)
        ),
        everywhere(Cause.NORM_LEAVES_OUT_SHARDS, replicated, "it is that of replicated parameters alone"),
        everywhere(Cause.NORM_LEAVES_OUT_SHARDS, shards, "it leaves out replicated parameters"),
    ]
    mean_of_shards, sum_of_shards = sum(of_shards) / tp, sum(of_shards)
    mean, total = Cause.NORM_AVERAGED_OVER_RANKS, Cause.NORM_SUMMED_OVER_RANKS
    yield [
        everywhere(mean, sum(of_ranks) / tp, "the mean of the ranks' norms"),
        everywhere(mean, hypot(*of_ranks) / sqrt(tp), "the root of the mean of the squares of the ranks' norms"),
        everywhere(mean, hypot(mean_of_shards, replicated), "the mean of the ranks' norms of shards"),
        everywhere(mean, hypot(shards / sqrt(tp), replicated), "the root of the mean of the squares of shards' norms"),
        everywhere(total, sum(of_ranks), "the sum of the ranks' norms"),
        everywhere(total, hypot(sum_of_shards, replicated), "the sum of the ranks' norms of shards"),
        everywhere(total, sum_of_shards + replicated, "the sum of the norms of shards and of replicated parameters"),
        everywhere(total, tp * whole, "the sum of the norm of all gradients, which each rank had", tp),
        everywhere(total, sqrt(tp) * whole, "the root of the sum of its square, which each rank had", sqrt(tp)),
        *_of_other_orders(norms),
        everywhere(Cause.NORM_WITHOUT_ROOT, whole**2 * observed.unit, "the sum of squares"),
        *(
            everywhere(
                Cause.NORM_BEFORE_UNSCALING,
                whole * scale,
                f"times {what}",
                0.0 if what == LOSS_SCALE else scale,  # no largest norm is so much smaller than another
                factor=scale,
            )
            for what, scale in observed.scales.items()
            if scale not in (0.0, 1.0)
        ),
        *_after_clipping(observed, norms),
    ]
    factor = observed.used[0] / whole if whole else 0.0
    if isfinite(factor) and factor > 1.5 and abs(factor - round(factor)) <= observed.noise * factor:
        number = float(round(factor))
        yield [everywhere(Cause.NORM_BEFORE_UNSCALING, whole * number, f"times {number:g}", number, factor=number)]


def _over_the_world(norms: GradientNorms) -> Iterator[Mistake]:
    """Yield sums of squares over all ranks in place of a TP group, which count every DP replica."""
    if norms.dp == 1:
        return
    cause, root = Cause.NORM_COUNTS_REPLICAS, sqrt(norms.dp)
    for norm, what in (
        (root * norms.counting_replicas, "all gradients"),
        (hypot(root * hypot(*norms.of_ranks_shards), norms.of_replicated), "shards"),
    ):
        note = f"squares of {what} are summed over all ranks, not over one TP group: DP replicas are counted, too"
        yield Mistake(cause, (norm,) * norms.tp, {"note": note})


def _of_other_orders(norms: GradientNorms) -> Iterator[Mistake]:
    cause, tp = Cause.NORM_OF_WRONG_ORDER, norms.tp
    names = {1.0: "the sum of absolute values", inf: "the largest absolute value"}
    for order, by_rank in norms.of_order.items():
        what = names.get(order, f"the norm of order {order:g}")
        combine = max if order == inf else sum
        of_ranks = tuple(combine(of_rank.values()) if of_rank else 0.0 for of_rank in by_rank)
        yield Mistake(cause, (norms.whole_of_order(order),) * tp, {"note": what, "order": str(order)})
        yield Mistake(cause, of_ranks, {"note": f"{what} on each rank", "order": str(order)})
    sizes = [sqrt(sum(squares)) for squares in norms.squares.values()]
    yield Mistake(cause, (sum(sizes),) * tp, {"note": "the sum of the parameters' norms", "order": "1.0"})
    yield Mistake(cause, (max(sizes),) * tp, {"note": "the largest of the parameters' norms", "order": "inf"})


def _after_clipping(observed: ObservedNorm, norms: GradientNorms) -> Iterator[Mistake]:
    clipping, whole = observed.clipping, norms.whole
    if clipping.max_norm <= 0 or whole <= clipping.max_norm:
        return
    for epsilon in dict.fromkeys((clipping.epsilon, *EPSILONS)):
        clipped = whole * clipping.max_norm / (whole + epsilon)
        yield Mistake(Cause.NORM_AFTER_CLIPPING, (clipped,) * norms.tp, {"note": "the norm of the clipped gradients"})


# ---- parameters and ranks that are left out, or counted too often


_Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Set:
    """Some parameters on some ranks: what the square of the norm has too little or too much of.

    Attributes:
        what: The parameters, as a phrase.
        how: What happens to them, as the rest of the sentence.
        names: The parameters.
        ranks: The tp_ranks.
        square: The sum of squares.
        is_item: Whether others are put together from it: a single parameter, or the same one of all layers.
    """

    what: str
    how: str
    names: frozenset[str]
    ranks: _Ranks
    square: float
    is_item: bool

    @property
    def label(self) -> str:
        return f"{self.what} is {self.how}"


def _selected(observed: ObservedNorm, norms: GradientNorms) -> Matches:
    """Return the parameters, and the ranks whose shards of them, a norm that is the same everywhere leaves out.

    Sets of parameters that a pattern of names describes are tried first, then two and three of them. None is named
    where so many are about as large that one of them would fit by chance.
    """
    used = observed.used[0]
    if used <= observed.least or observed.error_of((used,) * norms.tp, observed.noise) is None:
        return Matches()
    missing = norms.whole**2 - used**2
    if missing > 0:
        sets, cause = norms.left_out, Cause.NORM_LEAVES_OUT_SHARDS
    else:
        sets, cause = norms.counted_often, Cause.NORM_COUNTS_REPLICAS
    size = abs(missing)
    if size <= 2 * observed.noise * norms.whole**2:
        return Matches()  # it is the norm of these gradients, which are wrong themselves
    for tolerance in dict.fromkeys((observed.noise, observed.tolerance)):
        limit = min(2 * tolerance * used**2 + 2 * observed.noise * norms.whole**2, RESIDUAL_NOISY * size)
        for candidates in (sets, _pairs(sets, size), _triples(sets, size)):
            near = [each for each in candidates if abs(each.square - size) <= WINDOW_OF_CHANCE * size]
            exact = {(each.names, each.ranks): each for each in reversed(near) if abs(each.square - size) <= limit}
            chance = len(near) * limit / (WINDOW_OF_CHANCE * size)
            if exact and (len(exact) > 1 or chance > MOST_CHANCE):
                return Matches(could_be=tuple(f"{cause.slug}: {each.label}" for each in exact.values()))
            for each in exact.values():
                error = abs(sqrt(max(norms.whole**2 - each.square * (1 if missing > 0 else -1), 0.0)) - used) / used
                evidence = {"note": each.label, "parameters": sorted(each.names), "of_tp_ranks": list(each.ranks)}
                return Matches(Explanation(cause, error, evidence))
    return Matches()


def _sets(norms: GradientNorms) -> Iterator[_Set]:
    """Yield what may be left out: the parameters of each pattern, on all ranks, on one, or on all but one."""
    seen: set[tuple[frozenset[str], _Ranks]] = set()
    everyone = tuple(range(norms.tp))
    on_all: list[tuple[_Ranks, str]] = [(everyone, "left out")]
    on_some = [  # with two ranks the two are the same, and the first is named
        choice
        for rank in everyone
        for choice in (
            (tuple(other for other in everyone if other != rank), f"counted on tp rank {rank} alone"),
            ((rank,), f"left out on tp rank {rank}"),
        )
        if norms.tp > 1
    ]
    for pattern, names, is_item in _patterns(norms):
        for ranks, how in on_all if names & norms.replicated else on_all + on_some:
            if (names, ranks) not in seen:
                seen.add((names, ranks))
                squares = (norms.squares[name] for name in names)
                square = sum(of_ranks[rank] for of_ranks in squares for rank in ranks if rank < len(of_ranks))
                yield _Set(pattern, how, names, ranks, square, is_item)


def _replicas(norms: GradientNorms) -> Iterator[_Set]:
    """Yield the replicated parameters of each pattern, counted once for each rank."""
    seen: set[frozenset[str]] = set()
    everyone = tuple(range(norms.tp))
    for pattern, names, is_item in _patterns(norms):
        if names <= norms.replicated and names not in seen:
            seen.add(names)
            square = (norms.tp - 1) * sum(norms.squares[name][0] for name in names)
            yield _Set(pattern, "counted by each rank", names, everyone, square, is_item)


def _patterns(norms: GradientNorms) -> Iterator[tuple[str, frozenset[str], bool]]:
    """Yield single parameters, the same one of all layers, what else names or kinds have in common, and all others."""
    everything = frozenset(name for name in norms.names if sum(norms.squares[name]))
    items: dict[str, set[str]] = {name: {name} for name in norms.names if name in everything}
    groups: dict[str, set[str]] = {}
    for name in sorted(everything):
        parts = name.split(".")
        items.setdefault(".".join("*" if part.isdecimal() else part for part in parts), set()).add(name)
        patterns = [f"*.{'.'.join(parts[start:])}" for start in range(len(parts) - 1, max(len(parts) - 3, 0), -1)]
        for pattern in patterns + [f"{'.'.join(parts[:end])}.*" for end in range(1, len(parts))]:
            groups.setdefault(pattern, set()).add(name)
    groups["every sharded parameter"] = set(everything - norms.replicated)
    groups["every replicated parameter"] = set(everything & norms.replicated)
    groups |= {kind: set(everything & names) for kind, names in norms.kinds.items()}
    found = [(pattern, frozenset(names), True) for pattern, names in items.items()]
    found += [(pattern, frozenset(names), False) for pattern, names in groups.items()]
    found = [each for each in found if each[1] and each[1] != everything]
    yield from found
    for pattern, names, _ in found:
        yield f"all but {pattern}", everything - names, False


def _items(sets: Sequence[_Set]) -> Iterator[list[_Set]]:
    """Yield the sets that others are put together from, for each choice of ranks, by size."""
    items: dict[_Ranks, list[_Set]] = {}
    for each in sets:
        if each.is_item:
            items.setdefault(each.ranks, []).append(each)
    return (sorted(of_ranks, key=lambda each: each.square) for of_ranks in items.values())


def _joined(*parts: _Set) -> _Set:
    names = frozenset(name for part in parts for name in part.names)
    what = " and ".join(part.what for part in parts)
    return _Set(what, parts[0].how, names, parts[0].ranks, sum(part.square for part in parts), False)


def _pairs(sets: Sequence[_Set], size: float) -> Iterator[_Set]:
    for items in _items(sets):
        squares = [each.square for each in items]
        for number, each in enumerate(items):
            yield from _completed(items, squares, number + 1, (each,), size)


def _triples(sets: Sequence[_Set], size: float) -> Iterator[_Set]:
    for items in _items(sets):
        if len(items) > MOST_NAMES_IN_TRIPLES:
            continue
        squares = [each.square for each in items]
        for (_, first), (number, second) in combinations(enumerate(items), 2):
            if first.square + second.square <= size and not first.names & second.names:
                yield from _completed(items, squares, number + 1, (first, second), size)


def _completed(
    items: Sequence[_Set], squares: Sequence[float], start: int, parts: tuple[_Set, ...], size: float
) -> Iterator[_Set]:
    """Yield the parts with one more item, from `start` on, for which the sum is about `size`."""
    rest = size - sum(part.square for part in parts)
    window = WINDOW_OF_CHANCE * size
    for number in range(bisect_left(squares, rest - window, start), len(items)):
        if squares[number] > rest + window:
            return
        if not any(items[number].names & part.names for part in parts):
            yield _joined(*parts, items[number])


# ---- a step that was clipped by several norms


@dataclass(frozen=True, slots=True)
class ClippedStep:
    """By what a step's gradients were multiplied, as the weights after it show.

    Attributes:
        factors: Of each parameter, by tp_rank, where its step shows it.
        clipping: How the reference clips.
        expected: By what it multiplied the gradients.
    """

    factors: Mapping[str, tuple[float, ...]]
    clipping: Clipping
    expected: float

    @property
    def is_right(self) -> bool:
        """Whether every gradient was multiplied by the right factor."""
        factors = [factor for of_ranks in self.factors.values() for factor in of_ranks]
        return bool(factors) and all(_are_equal(factor, self.expected) for factor in factors)

    @property
    def is_uniform(self) -> bool:
        """Whether each rank multiplied all of its gradients by one number."""
        by_rank = zip(*self.factors.values(), strict=True)
        return all(_are_equal(factor, of_rank[0]) for of_rank in by_rank for factor in of_rank)

    def groups(self) -> list[tuple[float, frozenset[str]]]:
        """Return the parameters whose gradients were multiplied by one number, the same on all ranks, by that number.

        Nothing where the ranks have other numbers.
        """
        found: list[tuple[float, set[str]]] = []
        for name, factors in self.factors.items():
            if not all(_are_equal(factor, factors[0]) for factor in factors):
                return []
            same = next((names for factor, names in found if _are_equal(factor, factors[0])), None)
            if same is None:
                found.append((factors[0], same := set()))
            same.add(name)
        return [(factor, frozenset(names)) for factor, names in found]


def _are_equal(actual: float, expected: float) -> bool:
    return abs(actual - expected) <= FITTED_RELATIVE_ERROR * abs(expected)


def groups_with_own_norm(step: ClippedStep, norms: GradientNorms) -> list[tuple[frozenset[str], float]]:
    """Return groups of parameters, each clipped by the norm of its own gradients, with those norms; else nothing.

    A parameter that is too small to show its factor is in the group whose norm it completes. What was not clipped at
    all may be several groups: each parameter's norm is small enough.
    """
    groups, clipping = step.groups(), step.clipping
    counts = FITTED_RELATIVE_ERROR * norms.whole  # less is rounding, as of a gradient that is mathematically zero
    unknown = [name for name in norms.names if name not in step.factors and norms.norm_of([name]) > counts]
    if len(groups) < 2 or clipping.max_norm <= 0 or len(unknown) > MOST_UNKNOWN_FACTORS:
        return []
    found, unclipped = [], set[str]()
    for factor, names in groups:
        if _are_equal(factor, 1.0) and not clipping.scales_up:
            unclipped |= names
            continue
        choices = chain.from_iterable(combinations(unknown, number) for number in range(len(unknown) + 1))
        whole = next(
            (group for more in choices if _are_equal(clipping.factor(norms.norm_of(group := names | {*more})), factor)),
            None,
        )
        if whole is None:
            return []
        unknown = [name for name in unknown if name not in whole]
        found.append((whole, norms.norm_of(whole)))
    is_small = all(norms.norm_of([name]) <= clipping.max_norm for name in (*unclipped, *unknown))
    return found if is_small and (unclipped or not unknown) else []
