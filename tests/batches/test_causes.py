"""Each cause of wrong batches is named when its evidence holds, and not on less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpcheck.backends.live_groups import LiveGroups
from tpcheck.batches.causes import explain_difference, explain_once, explain_same_samples, with_cause
from tpcheck.batches.comparison import samples_come_once
from tpcheck.batches.records import BatchSummary, ContentDigests, Leaf, LoaderFacts
from tpcheck.batches.repeats import Gap, Repeat
from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.findings import Finding

GROUPS = LiveGroups(0, (0, 1), (0, 2), "topology")
CAUSES = set(
    """rng_differs_torch rng_differs_numpy rng_differs_python rng_differs_cuda sampler_sharded_by_world_rank
    same_order_different_seed padding_differs order_differs uneven_length duplicate_dp_batch samples_repeated
    samples_skipped""".split()
)
SAME_INDICES = {"indices": (4, 5), "indices_sorted": "45"}


def a_leaf(digest: str, *, dtype: str = "torch.float32", shape: tuple[int, ...] = (2, 8)) -> Leaf:
    return Leaf("pixels", "tensor", dtype, shape, "cpu", digest)


def two_ranks(
    *by_rank: dict[str, Any],
    rng: tuple[dict[str, str], ...] = ({}, {}),
    contents: ContentDigests | None = None,
    **shared: Any,
) -> list[BatchSummary]:
    """Summaries of ranks 0 and 1, whose one leaf differs; loader facts by rank, and those that both have."""
    return [
        BatchSummary(
            leaves=(a_leaf(f"bits of {rank}"),),
            rng=states,
            loader=LoaderFacts(**shared | facts),
            contents={"pixels": contents} if contents else {},
        )
        for rank, (facts, states) in enumerate(zip(by_rank or ({}, {}), rng, strict=True))
    ]


def of_ranks(*facts: dict[str, Any]) -> list[BatchSummary]:
    """Summaries of any number of ranks, whose one leaf differs."""
    return [
        BatchSummary(leaves=(a_leaf(f"bits of {rank}"),), loader=LoaderFacts(**fact)) for rank, fact in enumerate(facts)
    ]


def explained(summaries: list[BatchSummary]) -> Any:
    return explain_difference(summaries, ("pixels",))


def advice_of(explanation: Explanation) -> str:
    return explanation.cause.advise(explanation.evidence, GROUPS.topology) or ""


def cause_of(summaries: list[BatchSummary]) -> str | None:
    explanation = explained(summaries)
    return None if explanation is None else explanation.cause.slug


OTHER_STATES = ({"numpy": "a", "torch": "x"}, {"numpy": "b", "torch": "x"})


def test_a_generator_is_named_if_it_was_drawn_from_in_different_states() -> None:
    explanation = explained(two_ranks(rng=OTHER_STATES, drew=("numpy", "torch"), **SAME_INDICES))
    assert explanation.cause.slug == "rng_differs_numpy"
    assert explanation.evidence == {"where": "the main process", "generators": ["numpy"]}
    assert "np.random.seed(seed + dp_rank)" in advice_of(explanation)


def test_facts_of_workers_are_no_evidence_on_the_main_process() -> None:
    summaries = two_ranks(rng=OTHER_STATES, drew=("numpy",), worker_init_fn="seed_worker", **SAME_INDICES)
    assert "worker_init_fn" not in explained(summaries).evidence


def test_generators_of_workers_are_named_before_those_of_the_main_process() -> None:
    rng = tuple({"numpy": state, "worker0.python": state} for state in "ab")
    explanation = explained(two_ranks(rng=rng, drew=("numpy", "worker0.python"), **SAME_INDICES))
    assert explanation.cause.slug == "rng_differs_python"
    assert explanation.evidence["generators"] == ["worker0.python", "numpy"]


def test_a_generator_that_a_rank_does_not_report_explains_nothing() -> None:
    assert cause_of(two_ranks(rng=({"numpy": "a"}, {}), drew=("numpy",), **SAME_INDICES)) is None


@pytest.mark.parametrize("kind", ["torch", "numpy", "python", "cuda"])
def test_a_generator_of_a_worker_is_named(kind: str) -> None:
    name = f"worker1.{kind}"
    explanation = explained(two_ranks(rng=({name: "a"}, {name: "b"}), drew=(name,), worker_init_fn="seed_worker"))
    assert explanation.cause.slug == f"rng_differs_{kind}"
    assert explanation.evidence["where"] == "workers"
    assert explanation.evidence["worker_init_fn"] == "seed_worker"
    assert advice_of(explanation).startswith("Seed workers by dp_rank")


def test_a_generator_in_an_attribute_of_the_dataset_is_named() -> None:
    name = "worker0.numpy:dataset.rng"
    explanation = explained(two_ranks(rng=({name: "a"}, {name: "b"}), drew=(name,)))
    assert explanation.cause.slug == "rng_differs_numpy"
    assert "dataset.rng" in advice_of(explanation)


def test_generators_that_were_not_drawn_from_explain_nothing() -> None:
    assert cause_of(two_ranks(rng=OTHER_STATES, drew=(), **SAME_INDICES)) is None


def test_a_generator_in_the_same_state_on_all_ranks_explains_nothing() -> None:
    assert cause_of(two_ranks(rng=OTHER_STATES, drew=("torch",), **SAME_INDICES)) is None


def test_random_numbers_do_not_change_a_dtype() -> None:
    summaries = [
        BatchSummary(leaves=(a_leaf("a", dtype=dtype),), rng=states, loader=LoaderFacts(drew=("numpy",)))
        for dtype, states in zip(("torch.int32", "torch.int64"), OTHER_STATES, strict=True)
    ]
    assert cause_of(summaries) is None


def test_a_sampler_for_world_ranks_is_named() -> None:
    summaries = two_ranks(
        {"rank": 0, "indices": (0,), "indices_sorted": "0"},
        {"rank": 1, "indices": (1,), "indices_sorted": "1"},
        num_replicas=4,
        sampler="DistributedSampler",
    )
    explanation = explained(summaries)
    assert explanation.cause.slug == "sampler_sharded_by_world_rank"
    assert explanation.evidence == {"sampler": "DistributedSampler", "num_replicas": 4, "rank": [0, 1]}
    assert "num_replicas=2 and rank=dp_rank" in advice_of(explanation)


def test_an_iterable_dataset_sharded_by_world_rank_is_named() -> None:
    assert cause_of(two_ranks({"rank": 0}, {"rank": 1}, num_replicas=4)) == "sampler_sharded_by_world_rank"


def test_a_sampler_for_world_ranks_that_gives_the_same_indices_explains_nothing() -> None:
    assert cause_of(two_ranks({"rank": 0}, {"rank": 1}, num_replicas=4, **SAME_INDICES)) is None


def test_a_fact_that_only_some_ranks_know_explains_nothing_and_is_evidence() -> None:
    assert cause_of(of_ranks({"rank": 0}, {})) is None
    explanation = explained(of_ranks({"rank": 0, "num_replicas": 4}, {"rank": 0}, {"rank": 1}))
    assert explanation.cause.slug == "sampler_sharded_by_world_rank"
    assert explanation.evidence == {"num_replicas": [4, None, None], "rank": [0, 0, 1]}


OTHER_INDICES = ({"indices": (0, 3), "indices_sorted": "03"}, {"indices": (2, 1), "indices_sorted": "12"})
SHUFFLED_INDICES = ({"indices": (0, 3), "indices_sorted": "03"}, {"indices": (3, 0), "indices_sorted": "03"})


@pytest.mark.parametrize("seed", ["sampler_seed", "generator_seed", "epoch"])
def test_different_seeds_of_the_samplers_are_named(seed: str) -> None:
    summaries = two_ranks(
        *(facts | {seed: rank} for rank, facts in enumerate(OTHER_INDICES)), sampler="DistributedSampler"
    )
    explanation = explained(summaries)
    assert explanation.cause.slug == "same_order_different_seed"
    assert explanation.evidence == {"sampler": "DistributedSampler", seed: [0, 1]}


def test_a_seed_without_shuffling_explains_nothing() -> None:
    summaries = two_ranks(*(facts | {"sampler_seed": rank} for rank, facts in enumerate(OTHER_INDICES)), shuffle=False)
    assert cause_of(summaries) is None


def test_different_seeds_that_give_the_same_indices_explain_nothing() -> None:
    assert cause_of(two_ranks({"sampler_seed": 0}, {"sampler_seed": 1}, **SAME_INDICES)) is None


def test_a_sampler_seeded_from_a_torch_generator_in_different_states_has_a_different_seed() -> None:
    by_rank = (indices | {"sampler_rng": {"torch": str(rank)}} for rank, indices in enumerate(OTHER_INDICES))
    explanation = explained(two_ranks(*by_rank, sampler_drew=("torch",), sampler="RandomSampler"))
    assert explanation.cause.slug == "same_order_different_seed"
    assert explanation.evidence["drawn_from"] == "torch"


def test_a_sampler_that_draws_from_pythons_generator_names_that_generator() -> None:
    by_rank = (indices | {"sampler_rng": {"python": str(rank)}} for rank, indices in enumerate(OTHER_INDICES))
    assert cause_of(two_ranks(*by_rank, sampler_drew=("python",))) == "rng_differs_python"


def test_a_sampler_that_draws_from_pythons_generator_and_gives_the_same_indices_explains_nothing() -> None:
    by_rank = ({"sampler_rng": {"python": str(rank)}} for rank in range(2))
    assert cause_of(two_ranks(*by_rank, sampler_drew=("python",), **SAME_INDICES)) is None


def test_an_augmentation_does_not_explain_other_samples() -> None:
    assert cause_of(two_ranks(*OTHER_INDICES, rng=OTHER_STATES, drew=("numpy",))) is None


def test_the_same_indices_in_another_order_are_named() -> None:
    assert cause_of(two_ranks(*SHUFFLED_INDICES)) == "order_differs"


def test_the_same_rows_in_another_order_are_named() -> None:
    assert cause_of(two_ranks(contents=ContentDigests(rows="same"))) == "order_differs"


def test_files_listed_in_another_order_are_named() -> None:
    by_rank = ({"listing": {"files": ("ab", "sorted")}}, {"listing": {"files": ("ba", "sorted")}})
    explanation = explained(two_ranks(*by_rank, dataset="Folder", **SAME_INDICES))
    assert (explanation.cause.slug, explanation.evidence["dataset_lists_in_another_order"]) == (
        "order_differs",
        "files",
    )
    assert "sorted(os.listdir" in advice_of(explanation)


@pytest.mark.parametrize(
    "listings",
    [
        [("ab", "sorted"), ("ab", "sorted")],  # in the same order
        [("ab", "sorted"), ("ac", "others")],  # other files
        [("ab", "sorted"), (None, "sorted")],  # in an order that one rank does not know
    ],
)
def test_other_listings_of_files_explain_nothing(listings: list[tuple[str | None, str]]) -> None:
    by_rank = ({"listing": {"files": listing}} for listing in listings)
    assert cause_of(two_ranks(*by_rank, **SAME_INDICES)) is None


def test_the_order_of_a_set_of_words_advises_a_hash_seed() -> None:
    by_rank = ({"listing": {"words": ("ab", "all")}, "hash": "1"}, {"listing": {"words": ("ba", "all")}, "hash": "2"})
    assert "PYTHONHASHSEED" in advice_of(explained(two_ranks(*by_rank, **SAME_INDICES)))


def test_different_hashes_alone_explain_nothing() -> None:
    assert cause_of(two_ranks({"hash": "1"}, {"hash": "2"}, **SAME_INDICES)) is None


@pytest.mark.parametrize("same", [{"unpadded": "same"}, {"unmasked": "same"}])
def test_different_padding_of_the_same_tokens_is_named(same: dict[str, str]) -> None:
    explanation = explained(two_ranks(contents=ContentDigests(rows="", **same), **SAME_INDICES))
    assert explanation.cause.slug == "padding_differs"
    assert explanation.evidence == {"shapes": {"pixels": [[2, 8], [2, 8]]}}


def test_other_samples_are_not_explained_by_their_padding() -> None:
    assert cause_of(two_ranks(*OTHER_INDICES, contents=ContentDigests(rows="", unpadded="same"))) is None


def test_padding_has_to_explain_every_leaf_that_differs() -> None:
    digests = ContentDigests(rows="", unpadded="same")
    summaries = [
        BatchSummary(
            leaves=(a_leaf(f"{rank}"), Leaf("ids", "tensor", "torch.int64", (rank,), "cpu", f"{rank}")),
            contents={"pixels": digests, "ids": ContentDigests(rows=f"of {rank}", unpadded=f"of {rank}")},
        )
        for rank in range(2)
    ]
    explanation = explained(summaries)
    assert explanation is not None
    assert explanation.evidence == {"shapes": {"pixels": [[2, 8], [2, 8]]}}
    assert explain_difference(summaries, ("pixels", "ids")) is None


def test_many_indices_are_compared_by_their_digest() -> None:
    summaries = two_ranks(
        {"indices_digest": "a", "indices_sorted": "s"}, {"indices_digest": "b", "indices_sorted": "s"}
    )
    assert cause_of(summaries) == "order_differs"


def test_nothing_known_explains_nothing() -> None:
    assert cause_of(two_ranks()) is None


@pytest.mark.parametrize(
    ("known", "advice"),
    [
        ({"dispatch_batches": True}, "dispatch_batches=False"),
        ({"iterable": True}, "Shard the IterableDataset"),
        ({"sampler": "RandomSampler"}, "num_replicas=2, rank=dp_rank"),
    ],
)
def test_the_same_batch_on_replicas_has_the_advice_for_its_loader(known: dict[str, Any], advice: str) -> None:
    summary = BatchSummary(leaves=(a_leaf("same"),), loader=LoaderFacts(**known))
    explanation = explain_same_samples([summary, summary])
    assert explanation is not None
    assert (explanation.cause.slug, explanation.evidence["same"]) == ("duplicate_dp_batch", "whole batch")
    assert advice in advice_of(explanation)


def test_the_same_samples_on_replicas_are_named() -> None:
    summaries = [
        BatchSummary(leaves=(a_leaf(bits),), rows=rows) for bits, rows in (("a", ("1", "2")), ("b", ("2", "1")))
    ]
    explanation = explain_same_samples(summaries)
    assert explanation is not None
    assert (explanation.cause.slug, explanation.evidence["same"]) == ("duplicate_dp_batch", "samples")


def test_two_of_three_replicas_may_have_the_same_batch_or_samples() -> None:
    equal, other = BatchSummary(leaves=(a_leaf("same"),)), BatchSummary(leaves=(a_leaf("other"),))
    explanation = explain_same_samples([equal, other, equal])
    assert explanation is not None
    assert explanation.evidence["same"] == "whole batch"
    rows = [BatchSummary(leaves=(a_leaf(bits),), rows=(bits, "x")[: 1 + (bits != "b")]) for bits in "abc"]
    explanation = explain_same_samples(rows)
    assert explanation is not None
    assert explanation.evidence["same"] == "samples"


def test_different_samples_on_replicas_are_not_explained() -> None:
    assert explain_same_samples(two_ranks()) is None


def test_a_finding_gets_the_evidence_and_the_advice_of_its_cause() -> None:
    finding = Finding("batches_agree_within_tp", {"step": 3}, 1.0, 0.0, evidence={"differs": "length"})
    assert with_cause(finding, None, GROUPS) == finding
    explained_finding = with_cause(finding, Explanation(Cause.UNEVEN_LENGTH), GROUPS)
    assert explained_finding.cause == "uneven_length"
    assert explained_finding.evidence["differs"] == "length"
    assert explained_finding.evidence["advice"].startswith("Give every rank of a TP group the same samples")


@pytest.mark.parametrize(("dp_rank", "end"), [("groups.get_data_parallel_rank()", True), ("", False)])
def test_an_advice_on_dp_rank_says_where_to_get_it(dp_rank: str, end: bool) -> None:
    finding = Finding("batches_agree_within_tp", {"step": 3}, 1.0, 0.0)
    explanation = Explanation(Cause.RNG_DIFFERS_NUMPY, evidence={"where": "workers", "generators": ["worker0.numpy"]})
    advice = with_cause(finding, explanation, replace(GROUPS, dp_rank=dp_rank)).evidence["advice"]
    assert advice.endswith(f" Here dp_rank is {dp_rank}.") is end


def of_stream(rank: int, numbers: dict[str, int] | None = None, **facts: Any) -> BatchSummary:
    loader = LoaderFacts(dataset="Stream", iterable=True, numbers=numbers, **facts)
    return BatchSummary(leaves=(a_leaf(str(rank)),), rows=(2 * rank, 2 * rank + 1), loader=loader)


@pytest.mark.parametrize(
    ("numbers", "reads_rank", "is_named"),
    [
        (({"dataset.r": 2, "dataset.n": 4}, {"dataset.r": 3, "dataset.n": 4}), False, True),
        (({"dataset.r": 0, "dataset.n": 2}, {"dataset.r": 1, "dataset.n": 2}), False, True),  # by tp_rank
        (({"dataset.c.rank": 2, "dataset.c.size": 4}, {"dataset.c.rank": 3, "dataset.c.size": 4}), False, True),
        (({"dataset.seed": 2, "dataset.n": 4}, {"dataset.seed": 3, "dataset.n": 4}), False, False),
        (({"dataset.r": 2}, {"dataset.r": 3}), False, False),  # no count
        (({"dataset.r": 2, "dataset.n": 4}, {"dataset.r": 2, "dataset.n": 4}), False, False),
        (({"dataset.r": 5, "dataset.n": 9}, {"dataset.r": 7, "dataset.n": 9}), False, False),
        (({}, {}), True, True),
    ],
)
def test_a_stream_that_is_split_by_rank_counts_by_it(
    numbers: tuple[dict[str, int], dict[str, int]], reads_rank: bool, is_named: bool
) -> None:
    summaries = [of_stream(rank, of_rank, reads_rank=reads_rank) for rank, of_rank in enumerate(numbers)]
    explanation = explain_difference(summaries, ["pixels"], ranks=(2, 3))
    assert (explanation is not None and explanation.cause is Cause.SAMPLER_SHARDED_BY_WORLD_RANK) is is_named


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"dataset.length": 96, "dataset.world_size": 4}, 4),
        ({"dataset.num_shards": 4, "dataset.length": 96}, 4),
        ({"dataset.length": 96, "dataset.n": 2}, 2),  # as many as there are ranks here
        ({"dataset.length": 96, "dataset.n": 4}, None),
        ({"dataset.length": 96}, None),
    ],
)
def test_what_counts_the_ranks_is_no_length(counts: dict[str, int], shown: int | None) -> None:
    summaries = [of_stream(rank, {"dataset.rank": rank, **counts}) for rank in range(2)]
    explanation = explain_difference(summaries, ["pixels"], ranks=(0, 1))
    assert explanation is not None
    assert explanation.cause is Cause.SAMPLER_SHARDED_BY_WORLD_RANK
    assert explanation.evidence.get("num_replicas") == shown


def test_streams_that_have_samples_in_common_are_not_split_by_rank() -> None:
    numbers = [{"dataset.r": rank, "dataset.n": 2} for rank in range(2)]
    summaries = [replace(of_stream(rank, numbers[rank]), rows=(rank, rank + 1)) for rank in range(2)]
    assert explain_difference(summaries, ["pixels"], ranks=(0, 1)) is None


@pytest.mark.parametrize(
    ("noticed", "cause", "start"),
    [
        (Repeat(7, 5, 8), "samples_repeated", "Look where the loader goes back"),
        (Repeat(1, 0, 8, workers=(0, 1)), "samples_repeated", "Split the stream over the workers"),
        (Gap(7, 2, 36, 28), "samples_skipped", "Where a run resumes, skip what was trained on once"),
    ],
)
def test_samples_that_come_again_or_are_left_out_have_their_advice(
    noticed: Repeat | Gap, cause: str, start: str
) -> None:
    finding = samples_come_once(noticed, ranks=(0, 1))
    explained = with_cause(finding, explain_once(noticed, LoaderFacts(sampler="Own")), GROUPS)
    assert (explained.check, explained.cause, explained.where["step"]) == ("samples_come_once", cause, noticed.step)
    assert explained.evidence["advice"].startswith(start)


def test_every_cause_is_in_the_documentation() -> None:
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert [cause for cause in sorted(CAUSES) if f"`{cause}`" not in document] == []
