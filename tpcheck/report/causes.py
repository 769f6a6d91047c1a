"""What each cause means, as one sentence that its numerical test has shown to hold. No torch."""

from __future__ import annotations

from collections.abc import Mapping

# How exactly the test held is added behind the sentence: "... equals the expected one to 3.9e-16".
SENTENCES: Mapping[str, str] = {
    "all_zero": "every element is zero",
    "bias_added_per_rank": "the difference equals the bias, added once more for every other rank,",
    "bit_flipped": "one bit of one element differs",
    "dtype_rounded": "the expected tensor, rounded to a smaller dtype, equals the actual one",
    "duplicate_dp_batch": "data-parallel replicas train on the same samples",
    "duplicate_reduce": "the actual tensor equals the expected one times the number of TP ranks",
    "fused_blocks_interleaved": "fused blocks (QKV, gate and up) cut as if they were one give the actual tensor",
    "gradient_missing": "the parameter has no gradient on these ranks, the reference has one",
    "gradient_scaled": "the actual gradient equals the expected one times a constant",
    "head_mapping_wrong": "the heads of another rank give the actual tensor",
    "mean_instead_of_sum": "the actual tensor equals the expected one divided by the number of TP ranks",
    "missing_reduce": "the sum over the ranks equals the expected tensor",
    "norm_counts_replicas": "counting replicated parameters once for each rank gives the actual norm",
    "norm_is_local": "the norm of this rank's own shards equals the actual one",
    "not_finite": "some elements are infinite or not a number",
    "not_sharded": "the parameters have their full shape on every rank",
    "order_differs": "the same samples in another order",
    "padding_differs": "the same tokens with other padding",
    "partial_gradient_on_replica": "the sum of the ranks' gradients equals the expected one",
    "replica_drift": "the replicas were equal and have drifted apart",
    "rng_differs_cuda": "the CUDA generators of the ranks are in different states",
    "rng_differs_numpy": "the numpy generators of the ranks are in different states",
    "rng_differs_python": "the Python generators of the ranks are in different states",
    "rng_differs_torch": "the torch generators of the ranks are in different states",
    "same_order_different_seed": "each rank shuffled with a seed of its own",
    "sampler_sharded_by_world_rank": "the sampler deals samples to world ranks, not to data-parallel ranks",
    "shard_missing": "one rank's shard is missing",
    "shard_order_swapped": "the shards in another order of ranks equal the expected tensor",
    "shard_repeated": "one rank's shard stands in the place of every rank's",
    "stale_weight": "the actual tensor equals the expected one of an earlier step",
    "sum_instead_of_mean": "the actual tensor equals the expected one times the number of DP ranks",
    "tensor_missing": "the tensor is absent",
    "tensor_of_another_layer": "the same tensor of another layer equals the actual one",
    "tensor_unexpected": "the reference has no such tensor",
    "tied_weight_dropped": "one of two tied weights is absent",
    "tied_weight_untied": "two weights that the reference ties are separate",
    "transposed": "the transposed tensor equals the expected one",
    "uneven_length": "some ranks have more batches than others",
    "vocab_offset_wrong": "token ids shifted by another rank's vocabulary offset give the actual tensor",
    "wrong_group": "a reduction over another group gives the actual tensor",
    "wrong_shard_boundary": "the shards were cut at another boundary",
}


def sentence(cause: str, error: float | None) -> str:
    """Return the cause's slug and sentence, and how exactly its test held where that is a number."""
    words = SENTENCES.get(cause)
    exactness = "" if error is None else f" to {error:.1e}" if error else " to the bit"
    return f"{cause}: {words}{exactness}" if words else f"{cause}{exactness}"
