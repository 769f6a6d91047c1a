"""Each cause of wrong batches is named when its evidence holds, and not on less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tpcheck import Topology
from tpcheck.batches.causes import explain_batches
from tpcheck.batches.records import BatchFacts, Leaf
from tpcheck.core.causes import Explanation

TOPOLOGY = Topology(tp=2, dp=2)
CAUSES = set(
    """rng_differs_torch rng_differs_numpy rng_differs_python rng_differs_cuda sampler_sharded_by_world_rank
    same_order_different_seed padding_differs order_differs uneven_length duplicate_dp_batch""".split()
)
SAME_INDICES = {"indices": (4, 5), "indices_sorted": "45"}


def a_leaf(digest: str, *, dtype: str = "torch.float32", shape: tuple[int, ...] = (2, 8)) -> Leaf:
    return Leaf("pixels", "tensor", dtype, shape, "cpu", digest)


def two_ranks(*per_rank: dict[str, Any], rng: tuple[dict[str, str], ...] = ({}, {}), **shared: Any) -> list[BatchFacts]:
    """Facts of ranks 0 and 1, whose one leaf differs."""
    return [
        BatchFacts(3, leaves=(a_leaf(f"bits of {rank}"),), rng=states, loader=shared | own)
        for rank, (own, states) in enumerate(zip(per_rank or ({}, {}), rng, strict=True))
    ]


def explained(facts: list[BatchFacts], axis: str = "tp", differing: tuple[str, ...] = ("pixels",)) -> Any:
    return explain_batches(facts, axis, TOPOLOGY, (0, 1), differing)


def advice_of(found: Explanation) -> str:
    return found.cause.advise(found.evidence, TOPOLOGY) or ""


def the_cause(facts: list[BatchFacts], axis: str = "tp") -> str | None:
    found = explained(facts, axis)
    assert found is None or isinstance(found, Explanation)
    return None if found is None else found.cause.slug


APART = ({"numpy": "a", "torch": "x"}, {"numpy": "b", "torch": "x"})


def test_a_generator_that_was_drawn_from_in_different_states() -> None:
    found = explained(two_ranks(rng=APART, drew=("numpy", "torch"), **SAME_INDICES))
    assert found.cause.slug == "rng_differs_numpy"
    assert found.evidence == {"where": "the main process", "generators": ["numpy"]}
    assert "np.random.seed(seed + dp_rank)" in advice_of(found)


@pytest.mark.parametrize("kind", ["torch", "numpy", "python", "cuda"])
def test_a_generator_of_a_worker(kind: str) -> None:
    name = f"worker1.{kind}"
    found = explained(two_ranks(rng=({name: "a"}, {name: "b"}), drew=(name,), worker_init_fn="seed_worker"))
    assert found.cause.slug == f"rng_differs_{kind}"
    assert found.evidence["where"] == "workers"
    assert found.evidence["worker_init_fn"] == "seed_worker"
    assert advice_of(found).startswith("Seed workers by dp_rank")


def test_a_generator_of_the_datasets_own() -> None:
    name = "worker0.numpy:dataset.rng"
    found = explained(two_ranks(rng=({name: "a"}, {name: "b"}), drew=(name,)))
    assert found.cause.slug == "rng_differs_numpy"
    assert "dataset.rng" in advice_of(found)


def test_generators_in_different_states_that_nobody_drew_from_explain_nothing() -> None:
    assert the_cause(two_ranks(rng=APART, drew=(), **SAME_INDICES)) is None


def test_a_generator_that_was_drawn_from_in_one_state_explains_nothing() -> None:
    assert the_cause(two_ranks(rng=APART, drew=("torch",), **SAME_INDICES)) is None


def test_random_numbers_do_not_change_a_dtype() -> None:
    facts = [
        BatchFacts(0, leaves=(a_leaf("a", dtype=dtype),), rng=states, loader={"drew": ("numpy",)})
        for dtype, states in zip(("torch.int32", "torch.int64"), APART, strict=True)
    ]
    assert the_cause(facts) is None


def test_a_sampler_that_deals_to_world_ranks() -> None:
    facts = two_ranks(
        {"rank": 0, "indices": (0,), "indices_sorted": "0"},
        {"rank": 1, "indices": (1,), "indices_sorted": "1"},
        num_replicas=4,
        sampler="DistributedSampler",
    )
    found = explained(facts)
    assert found.cause.slug == "sampler_sharded_by_world_rank"
    assert found.evidence == {"sampler": "DistributedSampler", "num_replicas": 4, "rank": [0, 1]}
    assert "num_replicas=2 and rank=dp_rank" in advice_of(found)


def test_an_iterable_dataset_that_is_dealt_to_world_ranks() -> None:
    assert the_cause(two_ranks({"rank": 0}, {"rank": 1}, num_replicas=4)) == "sampler_sharded_by_world_rank"


OTHER_INDICES = ({"indices": (0, 3), "indices_sorted": "03"}, {"indices": (2, 1), "indices_sorted": "12"})
SHUFFLED_INDICES = ({"indices": (0, 3), "indices_sorted": "03"}, {"indices": (3, 0), "indices_sorted": "03"})


@pytest.mark.parametrize("seed", ["sampler_seed", "generator_seed", "epoch"])
def test_samplers_with_seeds_of_their_own(seed: str) -> None:
    facts = two_ranks(*(own | {seed: rank} for rank, own in enumerate(OTHER_INDICES)), sampler="DistributedSampler")
    found = explained(facts)
    assert found.cause.slug == "same_order_different_seed"
    assert found.evidence == {"sampler": "DistributedSampler", seed: [0, 1]}


def test_a_seed_that_nobody_shuffles_with_explains_nothing() -> None:
    facts = two_ranks(*(own | {"sampler_seed": rank} for rank, own in enumerate(OTHER_INDICES)), shuffle=False)
    assert the_cause(facts) is None


def test_a_sampler_that_is_seeded_by_a_generator_that_differs() -> None:
    own = (indices | {"sampler_rng": {"torch": str(rank)}} for rank, indices in enumerate(OTHER_INDICES))
    found = explained(two_ranks(*own, sampler_drew=("torch",), sampler="RandomSampler"))
    assert found.cause.slug == "same_order_different_seed"
    assert found.evidence["drawn_from"] == "torch"


def test_a_sampler_that_draws_from_another_generator() -> None:
    own = (indices | {"sampler_rng": {"python": str(rank)}} for rank, indices in enumerate(OTHER_INDICES))
    assert the_cause(two_ranks(*own, sampler_drew=("python",))) == "rng_differs_python"


def test_other_samples_are_not_blamed_on_an_augmentation() -> None:
    assert the_cause(two_ranks(*OTHER_INDICES, rng=APART, drew=("numpy",))) is None


def test_the_same_samples_in_another_order() -> None:
    assert the_cause(two_ranks(*SHUFFLED_INDICES)) == "order_differs"


def test_the_same_rows_in_another_order() -> None:
    assert the_cause(two_ranks(contents={"pixels": {"rows": "same"}})) == "order_differs"


def test_files_listed_in_another_order() -> None:
    own = ({"listing": {"files": ("ab", "sorted")}}, {"listing": {"files": ("ba", "sorted")}})
    found = explained(two_ranks(*own, dataset="Folder", **SAME_INDICES))
    assert (found.cause.slug, found.evidence["dataset_lists_in_another_order"]) == ("order_differs", "files")
    assert "sorted(os.listdir" in advice_of(found)


def test_words_in_the_order_of_a_set() -> None:
    own = ({"listing": {"words": ("ab", "all")}, "hash": "1"}, {"listing": {"words": ("ba", "all")}, "hash": "2"})
    assert "PYTHONHASHSEED" in advice_of(explained(two_ranks(*own, **SAME_INDICES)))


def test_other_hashes_alone_explain_nothing() -> None:
    assert the_cause(two_ranks({"hash": "1"}, {"hash": "2"}, **SAME_INDICES)) is None


def test_the_same_tokens_with_other_padding() -> None:
    facts = two_ranks(contents={"pixels": {"unpadded": "same"}}, **SAME_INDICES)
    assert the_cause(facts) == "padding_differs"


def test_ranks_that_end_before_others() -> None:
    facts = [BatchFacts(3, ended=True, loader={"length": 3}), BatchFacts(3, loader={"length": 4})]
    found = explained(facts)
    assert (found.cause.slug, found.evidence["length"]) == ("uneven_length", [3, 4])


def test_nothing_known_explains_nothing() -> None:
    assert the_cause(two_ranks()) is None


@pytest.mark.parametrize(
    ("known", "advice"),
    [
        ({"dispatch_batches": True}, "dispatch_batches=False"),
        ({"iterable": True}, "Shard the IterableDataset"),
        ({"sampler": "RandomSampler"}, "num_replicas=2, rank=dp_rank"),
    ],
)
def test_replicas_with_the_same_batch(known: dict[str, Any], advice: str) -> None:
    facts = [BatchFacts(0, leaves=(a_leaf("same"),), loader=known) for _ in range(2)]
    found = explained(facts, "dp", ())
    assert found.cause.slug == "duplicate_dp_batch"
    assert advice in advice_of(found)


def test_replicas_with_some_of_the_same_samples() -> None:
    facts = [BatchFacts(0, leaves=(a_leaf(bits),), rows=rows) for bits, rows in (("a", ("1", "2")), ("b", ("2", "3")))]
    found = explained(facts, "dp", ())
    assert (found.cause.slug, found.evidence["same"]) == ("duplicate_dp_batch", "samples")


def test_replicas_with_samples_of_their_own_are_not_explained() -> None:
    assert the_cause(two_ranks(), "dp") is None


def test_every_cause_is_in_the_documentation() -> None:
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert [cause for cause in sorted(CAUSES) if f"`{cause}`" not in document] == []
