"""What each cause means, as one sentence that its numerical test has shown to hold. No torch."""

from __future__ import annotations

from collections.abc import Mapping

# {to} is how exactly the test held: "equals the expected one to 3.9e-16".
SENTENCES: Mapping[str, str] = {
    "all_zero": "every wrong element is zero",
    "bias_added_per_rank": "with the bias added more than once the actual tensor comes out{to}",
    "bit_flipped": "one bit of one element differs",
    "dtype_rounded": "the expected tensor, rounded to a smaller dtype, equals the actual one{to}",
    "duplicate_dp_batch": "data-parallel replicas train on the same samples",
    "duplicate_reduce": "reducing over the ranks once more gives the actual tensor{to}",
    "fused_blocks_interleaved": "fused blocks (QKV, gate and up) are cut in one order and read in another",
    "gradient_missing": "the parameter has no gradient on these ranks, the reference has one",
    "gradient_scaled": "the actual gradient equals the expected one times a constant{to}",
    "head_mapping_wrong": "with the heads of another rank the expected tensor comes out{to}",
    "mean_instead_of_sum": "a mean over the ranks in place of the sum gives the actual tensor{to}",
    "missing_reduce": "leaving out the reduction over the ranks gives the actual tensor{to}",
    "norm_counts_replicas": "counting replicated parameters once for each rank gives the actual norm{to}",
    "norm_is_local": "the norm is that of one rank's own gradients{to}",
    "not_finite": "some elements are infinite or not a number",
    "not_sharded": "the parameters have their full shape on every rank",
    "order_differs": "the same samples in another order",
    "padding_differs": "the same tokens with other padding",
    "partial_gradient_on_replica": "the sum of the ranks' gradients equals the expected one{to}",
    "replica_drift": "the replicas were equal and have drifted apart",
    "rng_differs_cuda": "the batch is drawn from a CUDA generator whose state is not the same on these ranks",
    "rng_differs_numpy": "the batch is drawn from a numpy generator whose state is not the same on these ranks",
    "rng_differs_python": "the batch is drawn from a Python generator whose state is not the same on these ranks",
    "rng_differs_torch": "the batch is drawn from a torch generator whose state is not the same on these ranks",
    "same_order_different_seed": "each rank shuffled with a seed of its own",
    "sampler_sharded_by_world_rank": "the sampler deals samples to world ranks, not to data-parallel ranks",
    "shard_missing": "one rank's shard is missing",
    "shard_order_swapped": "the shards in another order of ranks equal the expected tensor{to}",
    "shard_repeated": "one rank's shard stands in every rank's place{to}",
    "stale_weight": "the actual tensor equals the expected one of an earlier step{to}",
    "sum_instead_of_mean": "a sum over the DP ranks in place of the mean gives the actual tensor{to}",
    "tensor_missing": "the tensor is absent",
    "tensor_of_another_layer": "the actual tensor equals the expected one of another layer{to}",
    "tensor_unexpected": "the reference has no such tensor",
    "tied_weight_dropped": "one of two tied weights is absent",
    "tied_weight_untied": "two weights that the reference ties are separate",
    "transposed": "the transposed tensor equals the expected one{to}",
    "uneven_length": "some ranks have more batches than others",
    "vocab_offset_wrong": "token ids shifted by another rank's vocabulary offset give the actual tensor{to}",
    "wrong_group": "the group that is used is not the declared one",
    "wrong_shard_boundary": "the shards were cut at another boundary{to}",
}


def sentence(cause: str, error: float | None) -> str:
    """Return the cause's slug and sentence; `error` is how exactly its test held, where that is a number."""
    to = "" if error is None else f" to {error:.1e}" if error else " to the bit"
    return f"{cause}: {SENTENCES[cause].format(to=to)}" if cause in SENTENCES else cause
