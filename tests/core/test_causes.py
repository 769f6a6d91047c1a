"""The catalogue of causes: a row each, and every slug stands in the source once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tokenize import STRING, generate_tokens

import pytest

import tpcheck
from tpcheck import Topology
from tpcheck.core.causes import Cause, sentence

# The stable slugs of the public contract.
SLUGS = set(
    """not_sharded missing_reduce duplicate_reduce mean_instead_of_sum sum_instead_of_mean bias_added_per_rank
    shard_order_swapped fused_blocks_interleaved wrong_shard_boundary shard_repeated shard_missing
    partial_gradient_on_replica gradient_missing gradient_scaled replica_drift wrong_group head_mapping_wrong
    vocab_offset_wrong norm_counts_replicas norm_is_local tied_weight_untied tied_weight_dropped dtype_rounded
    transposed stale_weight tensor_of_another_layer tensor_missing tensor_unexpected bit_flipped not_finite all_zero
    rng_differs_torch rng_differs_numpy rng_differs_python rng_differs_cuda sampler_sharded_by_world_rank
    same_order_different_seed padding_differs order_differs uneven_length duplicate_dp_batch""".split()
)


def test_the_catalogue_has_the_slugs_of_the_contract_and_no_others() -> None:
    assert {cause.slug for cause in Cause} == SLUGS


def test_a_slug_is_spelled_once_in_the_source() -> None:
    """Tables of faults say which causes are right; everything else says `Cause.MISSING_REDUCE`."""
    root = Path(tpcheck.__file__).parent
    places: Counter[str] = Counter()
    for file in sorted(root.rglob("*.py")):
        if (root / "lab" / "faults") in file.parents:
            continue
        with file.open() as source:
            strings = [token.string.strip("\"'") for token in generate_tokens(source.readline) if token.type == STRING]
        places.update(slug for slug in strings if slug in SLUGS)
    words = {"transposed": 2}  # a way to lay a tensor out, too: the tries of layers
    assert {slug: number for slug, number in places.items() if number != 1 + words.get(slug, 0)} == {}


@pytest.mark.parametrize("cause", Cause)
def test_what_to_change_is_a_sentence(cause: Cause) -> None:
    advice = cause.advise({"generators": ["torch"], "where": "workers"}, Topology(tp=2, dp=2))
    assert advice is None or (advice.endswith((".", "save_pretrained.")) and "{" not in advice)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (3.9e-16, "missing_reduce: leaving out the reduction over the ranks gives the actual tensor to 3.9e-16"),
        (0.0, "missing_reduce: leaving out the reduction over the ranks gives the actual tensor to the bit"),
        (None, "missing_reduce: leaving out the reduction over the ranks gives the actual tensor"),
    ],
)
def test_a_sentence_says_how_exactly_its_test_held(error: float | None, expected: str) -> None:
    assert sentence("missing_reduce", error) == expected


def test_a_cause_that_is_no_equality_has_no_exactness() -> None:
    assert sentence("gradient_missing", 0.0).endswith("the reference has one")


@pytest.mark.parametrize("cause", Cause)
def test_every_sentence_can_be_said(cause: Cause) -> None:
    assert "{" not in sentence(cause.slug, None)


def test_a_slug_of_a_third_party_stands_for_itself() -> None:
    assert sentence("gremlins", None) == "gremlins"
