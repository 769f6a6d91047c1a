"""Why the ranks got other batches than they should, from what each rank tells of its loader and its generators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.batches.records import BatchFacts
from tpcheck.core.causes import Cause, Explanation, first_explanation
from tpcheck.core.topology import Topology


def same_tokens(facts: Sequence[BatchFacts], differing: Sequence[str]) -> bool:
    """Tell whether all that differs is padding; see `tpcheck.batches.samples` for what each rank tells."""
    return _agree(facts, differing, "unpadded", "kept")


def same_rows(facts: Sequence[BatchFacts], differing: Sequence[str]) -> bool:
    """Tell whether each leaf that differs has the same rows on all ranks, in some order."""
    return _agree(facts, differing, "rows")


def _agree(facts: Sequence[BatchFacts], differing: Sequence[str], *keys: str) -> bool:
    """Tell whether all ranks have one digest of each leaf under one of the keys."""
    return bool(differing) and all(any(_one(facts, path, key) for key in keys) for path in differing)


def _one(facts: Sequence[BatchFacts], path: str, key: str) -> bool:
    digests = {rank.loader.get("contents", {}).get(path, {}).get(key) for rank in facts}
    return len(digests) == 1 and None not in digests


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be explained; the arguments of `explain_batches`."""

    facts: Sequence[BatchFacts]
    topology: Topology
    ranks: Sequence[int]
    differing: Sequence[str]

    def of_loader(self, key: str) -> list[Any]:
        """Return one fact of the loader on each rank, None where it is not known."""
        return [facts.loader.get(key) for facts in self.facts]

    def differ(self, key: str) -> bool:
        """Tell whether every rank knows this fact of its loader, and not all the same."""
        values = self.of_loader(key)
        return None not in values and unequal(values)


def explain_batches(
    facts: Sequence[BatchFacts], axis: str, topology: Topology, ranks: Sequence[int], differing: Sequence[str]
) -> Explanation | None:
    """Return why the batches of these ranks differ (axis `tp`) or do not (axis `dp`), or None where no test holds.

    Args:
        facts: Of each rank, at the first step that is wrong.
        axis: `tp` or `dp`.
        topology: Of the world.
        ranks: Global rank of each of `facts`.
        differing: Paths of the leaves that differ between the ranks; irrelevant for `dp`.
    """
    return first_explanation(Question(facts, topology, ranks, differing), _TESTS[axis])


def unequal(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _uneven_length(question: Question) -> Explanation | None:
    if not unequal([facts.ended for facts in question.facts]):
        return None
    evidence = {"ended": [facts.ended for facts in question.facts]}
    return Explanation(
        Cause.UNEVEN_LENGTH, evidence=evidence | _known(question, "length", "num_replicas", "rank", "drop_last")
    )


def _sharded_by_world_rank(question: Question) -> Explanation | None:
    """A sampler that deals to different replicas inside one TP group gives its ranks different samples."""
    if question.differ("rank") and not _same_indices(question):
        return Explanation(
            Cause.SAMPLER_SHARDED_BY_WORLD_RANK, evidence=_known(question, "sampler", "num_replicas", "rank")
        )
    return None


def _different_seed(question: Question) -> Explanation | None:
    """The order is shuffled, from seeds or generator states that are not the same."""
    if not _other_indices(question) or False in question.of_loader("shuffle"):
        return None
    seeds = [key for key in ("sampler_seed", "generator_seed", "epoch") if question.differ(key)]
    drawn = [name for name in _drawn_by_sampler(question) if _kind(name) == "torch"]
    if not seeds and not drawn:
        return None
    evidence = _known(question, "sampler", *seeds)
    return Explanation(Cause.SAME_ORDER_DIFFERENT_SEED, evidence=evidence | ({"drawn_from": drawn[0]} if drawn else {}))


def _sampler_draws(question: Question) -> Explanation | None:
    """The sampler draws from a generator of Python or NumPy, whose states differ."""
    drawn = _drawn_by_sampler(question) if _other_indices(question) else []
    if not drawn:
        return None
    evidence = {"where": "the sampler, in the main process", "generators": drawn}
    return Explanation(_differing_generator(drawn[0]), evidence=evidence | _known(question, "sampler"))


def _padding(question: Question) -> Explanation | None:
    if _other_indices(question) or not same_tokens(question.facts, question.differing):
        return None
    shapes = {
        path: [list(leaf.shape) for facts in question.facts for leaf in facts.leaves if leaf.path == path]
        for path in question.differing
    }
    return Explanation(Cause.PADDING_DIFFERS, evidence={"shapes": shapes})


def _generators(question: Question) -> Explanation | None:
    """A generator was drawn from while the batch was made, and stood at another place on the ranks before that."""
    if _other_indices(question) or not _comparable(question):
        return None
    drew = {name for facts in question.facts for name in facts.loader.get("drew", ())}
    guilty = sorted((name for name in drew if _states_differ(question, name)), key=_by_place)
    if not guilty:
        return None
    in_workers = guilty[0].startswith("worker")
    evidence = {"where": "workers" if in_workers else "the main process", "generators": guilty}
    if in_workers:
        evidence |= _known(question, "worker_init_fn", "worker_seed")
    return Explanation(_differing_generator(guilty[0]), evidence=evidence)


def _order(question: Question) -> Explanation | None:
    """The same samples: by their indices, by their rows, or by the names that the dataset lists."""
    if _other_indices(question):
        same = not unequal(question.of_loader("indices_sorted"))
        return Explanation(Cause.ORDER_DIFFERS, evidence=_known(question, "sampler", "indices")) if same else None
    if same_rows(question.facts, question.differing):
        return Explanation(Cause.ORDER_DIFFERS, evidence={"same_rows_in_another_order": list(question.differing)})
    listings = question.of_loader("listing")
    for attribute in listings[0] or ():
        digests = [(listing or {}).get(attribute, (None, None)) for listing in listings]
        if (
            (None, None) not in digests
            and unequal(digests)
            and not unequal([names_sorted for _, names_sorted in digests])
        ):
            evidence = {"dataset_lists_in_another_order": attribute} | _known(question, "dataset", "PYTHONHASHSEED")
            return Explanation(Cause.ORDER_DIFFERS, evidence=evidence | {"hash_differs": question.differ("hash")})
    return None


def _duplicate(question: Question) -> Explanation | None:
    leaves = [[(leaf.path, leaf.digest) for leaf in facts.leaves] for facts in question.facts]
    rows = [set(facts.rows) for facts in question.facts]
    pairs = [(a, b) for a in range(len(rows)) for b in range(a)]
    if any(leaves[a] and leaves[a] == leaves[b] for a, b in pairs):
        same = "whole batch"
    elif any(rows[a] and rows[a] & rows[b] for a, b in pairs):
        same = "samples"
    else:
        return None
    known = ("sampler", "num_replicas", "rank", "dispatch_batches", "iterable", "sampler_seed")
    return Explanation(Cause.DUPLICATE_DP_BATCH, evidence={"same": same} | _known(question, *known))


_TESTS: dict[str, tuple[Callable[[Question], Explanation | None], ...]] = {
    "tp": (
        _uneven_length,
        _sharded_by_world_rank,
        _different_seed,
        _sampler_draws,
        _padding,
        _generators,
        _order,
    ),
    "dp": (_uneven_length, _duplicate),
}


def _known(question: Question, *keys: str) -> dict[str, Any]:
    """Return these facts of the loader, where known: one value where all ranks agree, else one for each rank."""
    values = {key: question.of_loader(key) for key in keys}
    return {key: held if unequal(held) else held[0] for key, held in values.items() if held != [None] * len(held)}


def _indices(question: Question) -> list[Any]:
    return [facts.loader.get("indices", facts.loader.get("indices_digest")) for facts in question.facts]


def _other_indices(question: Question) -> bool:
    """Tell whether the ranks are known to have read different samples, or in another order."""
    indices = _indices(question)
    return None not in indices and unequal(indices)


def _same_indices(question: Question) -> bool:
    indices = _indices(question)
    return None not in indices and not unequal(indices)


def _comparable(question: Question) -> bool:
    """Tell whether some leaf that differs has one dtype on all ranks: no random number changes a dtype."""
    for path in question.differing:
        leaves = [next((leaf for leaf in facts.leaves if leaf.path == path), None) for facts in question.facts]
        types = {(leaf.kind, leaf.dtype) for leaf in leaves if leaf is not None}
        if None not in leaves and len(types) == 1:
            return True
    return False


def _states_differ(question: Question, name: str) -> bool:
    states = [facts.rng.get(name) for facts in question.facts]
    return None not in states and unequal(states)


def _drawn_by_sampler(question: Question) -> list[str]:
    """Return the generators that the sampler drew from on some rank, and that stood at different places before."""
    drawn = {name for drew in question.of_loader("sampler_drew") for name in drew or ()}
    states = [held or {} for held in question.of_loader("sampler_rng")]
    return sorted(
        name for name in drawn if all(name in held for held in states) and unequal([held[name] for held in states])
    )


def _by_place(name: str) -> tuple[bool, str]:
    """Sort generators of workers first: where there are workers, they make the samples."""
    return not name.startswith("worker"), name


def _kind(name: str) -> str:
    """Return `numpy` for `worker3.numpy:dataset.rng`."""
    return name.partition(":")[0].rpartition(".")[2]


def _differing_generator(name: str) -> Cause:
    return Cause[f"RNG_DIFFERS_{_kind(name).upper()}"]
