"""Why the batches of some ranks differ, or are the same: one test for each cause, and the finding with its cause."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpcheck.backends.live_groups import LiveGroups
from tpcheck.batches.records import BatchSummary, LoaderFacts
from tpcheck.batches.repeats import Gap, Repeat
from tpcheck.core.causes import Cause, Explanation, first_explanation
from tpcheck.core.findings import Finding
from tpcheck.core.topology import Topology


def with_cause(finding: Finding, explanation: Explanation | None, groups: LiveGroups | None) -> Finding:
    """Return the finding with a cause, its evidence and its advice; as it is where there is no explanation.

    Args:
        finding: Of a check.
        explanation: Its cause.
        groups: They say where to get the `dp_rank` that an advice speaks of.
    """
    if explanation is None:
        return finding
    advice = explanation.cause.advise(explanation.evidence, Topology() if groups is None else groups.topology)
    if advice is not None and "dp_rank" in advice and groups is not None and groups.dp_rank:
        advice = f"{advice} Here dp_rank is {groups.dp_rank}."
    evidence = {**finding.evidence, **explanation.evidence, "advice": advice}
    return replace(finding, cause=explanation.cause.slug, evidence=evidence)


def explain_difference(
    summaries: Sequence[BatchSummary], differing: Sequence[str], ranks: Sequence[int] = ()
) -> Explanation | None:
    """Return why the batches of a TP group differ, or None where no test holds.

    Args:
        summaries: One for each rank.
        differing: Paths of the leaves that differ.
        ranks: Their global ranks.
    """
    return first_explanation(_Context(summaries, differing, ranks), _TESTS)


def explain_same_samples(summaries: Sequence[BatchSummary]) -> Explanation | None:
    """Return why replicas have the same samples; None where they do not.

    Args:
        summaries: One for each replica.
    """
    context = _Context(summaries)
    leaves = [[(leaf.path, leaf.digest) for leaf in summary.leaves] for summary in summaries]
    rows = [set(summary.rows) for summary in summaries]
    pairs = [(a, b) for a in range(len(rows)) for b in range(a)]
    if any(leaves[a] and leaves[a] == leaves[b] for a, b in pairs):
        same = "whole batch"
    elif any(rows[a] & rows[b] for a, b in pairs):
        same = "samples"
    else:
        return None
    facts = context.loader_facts("sampler", "num_replicas", "rank", "dispatch_batches", "iterable", "sampler_seed")
    return Explanation(Cause.DUPLICATE_DP_BATCH, evidence={"same": same} | facts)


def explain_once(noticed: Repeat | Gap, loader: LoaderFacts) -> Explanation:
    """Return why samples came again or were left out: the tests are those of `tpcheck.batches.repeats`."""
    known = {"sampler": loader.sampler, "dataset": loader.dataset}
    evidence: dict[str, Any] = {name: value for name, value in known.items() if value and not value.startswith("_")}
    cause = Cause.SAMPLES_SKIPPED if isinstance(noticed, Gap) else Cause.SAMPLES_REPEATED
    if isinstance(noticed, Repeat) and noticed.workers:
        evidence["workers"] = list(noticed.workers)
    return Explanation(cause, evidence=evidence)


@dataclass(frozen=True, slots=True)
class _Context:
    """What the tests look at; the arguments of `explain_difference`."""

    summaries: Sequence[BatchSummary]
    differing: Sequence[str] = ()
    ranks: Sequence[int] = ()

    def fact(self, key: str) -> list[Any]:
        """Return one fact of the loader on each rank, None where it is not known."""
        return [getattr(summary.loader, key) for summary in self.summaries]

    def loader_facts(self, *keys: str) -> dict[str, Any]:
        """Return these facts of the loader, where known: one value where all ranks agree, else one for each rank."""
        facts = {key: self.fact(key) for key in keys}
        known = {key: values for key, values in facts.items() if any(value is not None for value in values)}
        return {key: values if _unequal(values) else values[0] for key, values in known.items()}

    def fact_differs(self, key: str) -> bool:
        """Return whether every rank knows this fact of its loader, and not all the same."""
        return _known_to_differ(self.fact(key))

    def indices(self) -> list[Any]:
        """Return each rank's sample indices or their digest, None where they are not known."""
        loaders = [summary.loader for summary in self.summaries]
        return [loader.indices_digest if loader.indices is None else loader.indices for loader in loaders]

    def indices_differ(self) -> bool:
        """Return whether the ranks are known to have read different samples, or in another order."""
        return _known_to_differ(self.indices())

    def indices_agree(self) -> bool:
        """Return whether the ranks are known to have read the same samples in the same order."""
        return None not in self.indices() and not _unequal(self.indices())

    def contents_agree(self, *keys: str) -> bool:
        """Return whether each leaf that differs has one digest of its contents on all ranks, under one of the keys."""

        def agrees(path: str, key: str) -> bool:
            digests = {getattr(summary.contents.get(path), key, None) for summary in self.summaries}
            return len(digests) == 1 and None not in digests

        return bool(self.differing) and all(any(agrees(path, key) for key in keys) for path in self.differing)

    def sampler_generators(self) -> list[str]:
        """Return the generators that the sampler drew from on some rank, and whose states differed before that."""
        drawn = {name for summary in self.summaries for name in summary.loader.sampler_drew}
        states = [summary.loader.sampler_rng for summary in self.summaries]
        return sorted(name for name in drawn if _known_to_differ([digests.get(name) for digests in states]))

    def some_dtype_agrees(self) -> bool:
        """Return whether some leaf that differs has one dtype on all ranks: no random number changes a dtype."""
        for path in self.differing:
            leaves = [next((leaf for leaf in each.leaves if leaf.path == path), None) for each in self.summaries]
            types = {(leaf.kind, leaf.dtype) for leaf in leaves if leaf is not None}
            if None not in leaves and len(types) == 1:
                return True
        return False


def _unequal(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _known_to_differ(values: Sequence[Any]) -> bool:
    return None not in values and _unequal(values)


def _sharded_by_world_rank(context: _Context) -> Explanation | None:
    """A sampler for different replicas inside one TP group gives its ranks different samples."""
    if context.fact_differs("rank") and not context.indices_agree():
        evidence = context.loader_facts("sampler", "num_replicas", "rank")
        return Explanation(Cause.SAMPLER_SHARDED_BY_WORLD_RANK, evidence=evidence)
    return None


def _seeds_differ(context: _Context) -> Explanation | None:
    """The order is shuffled, from seeds or states of a torch generator that differ."""
    if not context.indices_differ() or False in context.fact("shuffle"):
        return None
    seeds = [key for key in ("sampler_seed", "generator_seed", "epoch") if context.fact_differs(key)]
    drawn = [name for name in context.sampler_generators() if _kind(name) == "torch"]
    if not seeds and not drawn:
        return None
    evidence = context.loader_facts("sampler", *seeds)
    return Explanation(Cause.SAME_ORDER_DIFFERENT_SEED, evidence=evidence | ({"drawn_from": drawn[0]} if drawn else {}))


def _sampler_draws(context: _Context) -> Explanation | None:
    """The sampler draws from a generator of Python or NumPy, whose states differ."""
    drawn = context.sampler_generators() if context.indices_differ() else []
    if not drawn:
        return None
    evidence = {"where": "the sampler, in the main process", "generators": drawn}
    return Explanation(_rng_cause(drawn[0]), evidence=evidence | context.loader_facts("sampler"))


def _padding_differs(context: _Context) -> Explanation | None:
    """All that differs is padding."""
    if context.indices_differ() or not context.contents_agree("unpadded", "unmasked"):
        return None
    shapes = {
        path: [list(leaf.shape) for summary in context.summaries for leaf in summary.leaves if leaf.path == path]
        for path in context.differing
    }
    return Explanation(Cause.PADDING_DIFFERS, evidence={"shapes": shapes})


def _generators_differ(context: _Context) -> Explanation | None:
    """A generator was drawn from while the batch was made, and its states on the ranks differed before that."""
    if context.indices_differ() or not context.some_dtype_agrees():
        return None
    drawn = {name for summary in context.summaries for name in summary.loader.drew}
    differing = [name for name in drawn if _known_to_differ([summary.rng.get(name) for summary in context.summaries])]
    if not differing:
        return None
    # Generators of workers first: where there are workers, they make the samples.
    generators = sorted(differing, key=lambda name: (not name.startswith("worker"), name))
    in_workers = generators[0].startswith("worker")
    evidence = {"where": "workers" if in_workers else "the main process", "generators": generators}
    if in_workers:
        evidence |= context.loader_facts("worker_init_fn", "worker_seed")
    return Explanation(_rng_cause(generators[0]), evidence=evidence)


def _order_differs(context: _Context) -> Explanation | None:
    """The samples are the same: by their indices, by their rows, or by the names that the dataset lists."""
    if context.indices_differ():
        same = not _unequal(context.fact("indices_sorted"))
        return Explanation(Cause.ORDER_DIFFERS, evidence=context.loader_facts("sampler", "indices")) if same else None
    if context.contents_agree("rows"):
        return Explanation(Cause.ORDER_DIFFERS, evidence={"same_rows_in_another_order": list(context.differing)})
    listings = [summary.loader.listing or {} for summary in context.summaries]
    for attribute in listings[0]:
        in_order, in_sorted_order = zip(*(listing.get(attribute, (None, None)) for listing in listings), strict=True)
        if _known_to_differ(in_order) and not _unequal(in_sorted_order):
            evidence = {"dataset_lists_in_another_order": attribute} | context.loader_facts("dataset", "PYTHONHASHSEED")
            return Explanation(Cause.ORDER_DIFFERS, evidence=evidence | {"hash_differs": context.fact_differs("hash")})
    return None


def _read_by_world_rank(context: _Context) -> Explanation | None:
    """The ranks have no sample in common, and what gives them counts by rank: an attribute, or the method itself."""
    rows = [set(summary.rows) for summary in context.summaries]
    if not all(rows) or any(rows[a] & rows[b] for a in range(len(rows)) for b in range(a)):
        return None
    evidence = context.loader_facts("dataset", "iterable")
    for name, counts in _ranks_and_counts(context):
        by_rank = [(summary.loader.numbers or {})[name] for summary in context.summaries]
        found: dict[str, Any] = {"attribute": name, "rank": by_rank}
        if len(counts) == 1:
            found["num_replicas"] = counts.pop()
        return Explanation(Cause.SAMPLER_SHARDED_BY_WORLD_RANK, evidence=evidence | found)
    if all(context.fact("reads_rank")):
        return Explanation(Cause.SAMPLER_SHARDED_BY_WORLD_RANK, evidence=evidence | {"reads": "world rank and size"})
    return None


def _ranks_and_counts(context: _Context) -> Iterator[tuple[str, set[int]]]:
    """Yield the names of numbers that are the ranks (of the world, or of the TP group), each with what counts them.

    Beside a rank there is always a greater number; it may be a length. What counts ranks has a name that says so, or
    is the number of ranks that are here.
    """
    numbers = [summary.loader.numbers or {} for summary in context.summaries]
    for name in numbers[0]:
        values = [of_rank.get(name) for of_rank in numbers]
        if values not in ([*context.ranks], [*range(len(numbers))]) or "seed" in name:
            continue
        owner, least = name.rpartition(".")[0], max(filter(None, values), default=0)
        greater = {
            other.rpartition(".")[2]: count
            for other, count in numbers[0].items()
            if other.rpartition(".")[0] == owner
            and count > least
            and all(of_rank.get(other) == count for of_rank in numbers)
        }
        named = {count for other, count in greater.items() if _COUNTS_RANKS.search(other)}
        if greater:
            yield name, named or {*greater.values()} & {len(numbers)}


_COUNTS_RANKS = re.compile("world|rank|replica|shard|process", re.IGNORECASE)


# The first test that holds names the cause: where ranks read other samples, what is drawn from them differs, too.
_TESTS: tuple[Callable[[_Context], Explanation | None], ...] = (
    _sharded_by_world_rank,
    _seeds_differ,
    _sampler_draws,
    _padding_differs,
    _generators_differ,
    _order_differs,
    _read_by_world_rank,
)


def _kind(generator: str) -> str:
    """Return `numpy` for `worker3.numpy:dataset.rng`."""
    return generator.partition(":")[0].rpartition(".")[2]


def _rng_cause(generator: str) -> Cause:
    return Cause[f"RNG_DIFFERS_{_kind(generator).upper()}"]
