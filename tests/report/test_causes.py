"""Every cause that tpcheck names has a sentence."""

from __future__ import annotations

import pytest

from tpcheck.report.causes import SENTENCES, sentence

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


def test_every_slug_has_a_sentence_and_every_sentence_a_slug() -> None:
    assert set(SENTENCES) == SLUGS


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


@pytest.mark.parametrize("cause", SENTENCES)
def test_every_sentence_can_be_said(cause: str) -> None:
    assert "{" not in sentence(cause, None)


def test_a_slug_of_a_third_party_stands_for_itself() -> None:
    assert sentence("gremlins", None) == "gremlins"
