"""The catalogue of causes: one row each, which says where its tests are; every slug is in the source once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from tokenize import STRING, generate_tokens

import pytest

import tpcheck
from tpcheck import Topology
from tpcheck.core.causes import Cause, cause_text

# The stable slugs of the public contract.
SLUGS = set(
    """not_sharded missing_reduce duplicate_reduce mean_instead_of_sum sum_instead_of_mean bias_added_per_rank
    shard_order_swapped fused_blocks_interleaved wrong_shard_boundary shard_repeated shard_missing
    partial_gradient_on_replica gradient_missing gradient_scaled replica_drift wrong_group head_mapping_wrong
    vocab_offset_wrong norm_counts_replicas norm_is_local tied_weight_untied tied_weight_dropped dtype_rounded
    transposed stale_weight tensor_of_another_layer tensor_missing tensor_unexpected bit_flipped not_finite all_zero
    rng_differs_torch rng_differs_numpy rng_differs_python rng_differs_cuda sampler_sharded_by_world_rank
    same_order_different_seed padding_differs order_differs uneven_length duplicate_dp_batch
    reduced_after_accumulation last_micro_batch_only micro_batch_unreduced mean_of_local_means optimizer_sees_one_shard
    optimizer_state_of_another_rank optimizer_state_lost masters_stale
    norm_leaves_out_shards norm_averaged_over_ranks norm_summed_over_ranks
    options_differ nondeterminism collective_without_backward norm_of_wrong_order norm_without_root
    norm_before_unscaling norm_after_clipping reported_norm_wrong clipped_per_group clip_epsilon_differs
    gate_up_exchanged key_value_exchanged rotary_layout offset_by_constant
    token_mean_instead_of_mean samples_repeated samples_skipped use_of_module_lost statistic_over_one_shard
    not_loaded step_skipped init_depends_on_tp replicas_drawn_apart drawn_separately
    slice_of_another_sample slice_taken_for_first positions_of_another_order""".split()
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
    words = {"transposed": 2}  # also a layout that the trials of layers use
    assert {slug: number for slug, number in places.items() if number != 1 + words.get(slug, 0)} == {}


# They pass explanations on, or arrange tests: no test of theirs names a cause.
PASSES_ON = (
    *("numerics.hypotheses", "numerics.hypotheses.weights", "numerics.group_answer"),
    *("runs.comparing.full_causes", "checkpoints.states"),
)


def modules_naming(cause: Cause) -> list[str]:
    """Return the modules that name a cause; those of generators are looked up by their kind."""
    root = Path(tpcheck.__file__).parent
    name = re.compile(rf"\bCause\.{cause.name}\b|Cause\[f?.{cause.name.rpartition('_')[0]}_\{{")
    return [
        ".".join(file.relative_to(root).with_suffix("").parts)
        for folder in ("numerics", "batches", "checkpoints", "runs")
        for file in sorted((root / folder).rglob("*.py"))
        if name.search(file.read_text())
    ]


@pytest.mark.parametrize("cause", Cause)
def test_the_catalogue_says_where_a_cause_is_tested(cause: Cause) -> None:
    modules = modules_naming(cause)
    for place in cause.diagnosed_in:
        assert any(f"{module}.".startswith(f"{place}.") for module in modules), place
    others = [
        module for module in modules if not any(f"{module}.".startswith(f"{place}.") for place in cause.diagnosed_in)
    ]
    assert set(others) <= set(PASSES_ON)


@pytest.mark.parametrize("cause", Cause)
def test_advice_is_a_sentence(cause: Cause) -> None:
    advice = cause.advise({"generators": ["torch"], "where": "workers"}, Topology(tp=2, dp=2))
    assert advice is None or (advice.endswith(".") and "{" not in advice)


def test_advice_on_an_order_says_whether_the_seeds_or_the_epochs_differ() -> None:
    advise, topology = Cause.SAME_ORDER_DIFFERENT_SEED.advise, Topology(tp=2)
    assert "their seeds are equal" in str(advise({"sampler": "DistributedSampler", "epoch": [0, 1]}, topology))
    assert "one seed on all ranks" in str(advise({"sampler_seed": [3, 4], "epoch": [0, 1]}, topology))


def test_advice_on_files_is_no_advice_on_a_training() -> None:
    for cause in (Cause.SHARD_MISSING, Cause.DUPLICATE_REDUCE, Cause.REPLICA_DRIFT, Cause.TENSOR_MISSING):
        assert cause.advise() is not None
        assert cause.advise_training() is None
    for cause in (Cause.COLLECTIVE_WITHOUT_BACKWARD, Cause.NORM_IS_LOCAL, Cause.OPTIMIZER_SEES_ONE_SHARD):
        assert cause.advise_training() == cause.advise()
    assert Cause.MISSING_REDUCE.advise_training() is None


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        (3.9e-16, "missing_reduce: leaving out the reduction over the ranks gives the actual tensor to 3.9e-16"),
        (0.0, "missing_reduce: leaving out the reduction over the ranks gives the actual tensor to the bit"),
        (None, "missing_reduce: leaving out the reduction over the ranks gives the actual tensor"),
    ],
)
def test_a_sentence_says_how_exactly_the_test_of_its_cause_held(residual: float | None, expected: str) -> None:
    assert cause_text("missing_reduce", residual) == expected


def test_the_sentence_of_a_cause_that_is_no_equality_has_no_error() -> None:
    assert cause_text("gradient_missing", 0.0).endswith("the reference has one")


@pytest.mark.parametrize("cause", Cause)
def test_every_sentence_can_be_filled_in(cause: Cause) -> None:
    assert "{" not in cause_text(cause.slug, None)


def test_a_slug_of_a_third_party_stands_for_itself() -> None:
    assert cause_text("gremlins", None) == "gremlins"
