"""The table of tests: which causes a suspect is tested for, in which order. The first that holds explains it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tpcheck.core.causes import Explanation, first_explanation
from tpcheck.numerics.evidence import Kind, Suspect
from tpcheck.numerics.hypotheses.gradients import (
    another_parameters_hypotheses,
    missing,
    multiple,
    untied_hypotheses,
    vanished,
)
from tpcheck.numerics.hypotheses.layout import (
    another_group,
    fused_blocks_interleaved,
    heads_moved,
    not_sharded,
    remainder_lost,
    shard_missing,
    shards_moved,
)
from tpcheck.numerics.hypotheses.optimizer import (
    clipped_by_local_norm,
    clipped_by_norm_of_replicas,
    norm_counts_replicas,
    norm_is_local,
    replicas_drift,
    replicas_drift_in_step,
    step_hypotheses,
)
from tpcheck.numerics.hypotheses.proof import Test, predicted
from tpcheck.numerics.hypotheses.reductions import (
    averaging_hypotheses,
    issued_over_another_group,
    linear_hypotheses,
    over_dp,
    over_tp,
    over_tp_on_some,
    terms_of_input_gradient,
    terms_of_output,
    terms_of_parameter_gradient,
    terms_of_replicas,
    times_dp,
    times_tp,
    times_tp_on_some,
    where_module_computed_it,
    where_replicas_are_averaged,
)
from tpcheck.numerics.hypotheses.values import all_zero, dtype_rounded, loses_numbers, not_finite
from tpcheck.numerics.hypotheses.vocabulary import embedding_hypotheses, loss_hypotheses
from tpcheck.numerics.hypotheses.weights import each_rank, whole_weight


def explain(suspect: Suspect) -> Explanation | None:
    """Return the first cause whose test holds, or None where none does."""
    return first_explanation(suspect, applicable(suspect))


def applicable(suspect: Suspect) -> tuple[Test, ...]:
    """Return the tests for a suspect, in order."""
    return (not_finite,) if suspect.kind in _COMPUTED and loses_numbers(suspect) else TESTS[suspect.kind]


_COMPUTED: Collection[Kind] = ("activation", "input_gradient", "gradient", "update")  # weights are compared by bits

TESTS: Mapping[Kind, tuple[Test, ...]] = {
    "group": (another_group,),
    "sharding": (not_sharded, shard_missing, remainder_lost),
    "weight": (whole_weight, each_rank),
    "activation": (
        fused_blocks_interleaved,
        terms_of_output,
        times_tp,
        over_tp,
        predicted(linear_hypotheses, embedding_hypotheses, loss_hypotheses),
        times_tp_on_some,
        over_tp_on_some,
        heads_moved,
        shards_moved,
        all_zero,
        dtype_rounded,
        times_dp,
        issued_over_another_group,
    ),
    "input_gradient": (
        vanished,
        terms_of_input_gradient,
        where_module_computed_it(times_tp),
        where_module_computed_it(over_tp),
        where_module_computed_it(times_tp_on_some),
        where_module_computed_it(over_tp_on_some),
        predicted(linear_hypotheses),
        multiple,
        dtype_rounded,
    ),
    "gradient": (
        missing,
        terms_of_parameter_gradient,
        where_replicas_are_averaged(times_dp),
        where_replicas_are_averaged(over_dp),
        multiple,
        predicted(untied_hypotheses, averaging_hypotheses, another_parameters_hypotheses),
        shards_moved,
        dtype_rounded,
    ),
    "norm": (norm_is_local, norm_counts_replicas),
    "update": (
        predicted(step_hypotheses),
        dtype_rounded,
        clipped_by_local_norm,
        clipped_by_norm_of_replicas,
        replicas_drift_in_step,
    ),
    "replica": (terms_of_replicas, replicas_drift),
}
