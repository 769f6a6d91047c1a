"""Turns the facts of a suspect into the cause that explains it: each is named only where its own numerical test holds.

`TESTS` is the table of tests by kind of tensor. A test is a function of a `Suspect`, the tensors and typed facts that a
check hands over: it returns an `Explanation` where the statement in its docstring holds, else None. `proof` has how
much of a difference may remain. A hypothesis predicts what each rank holds under a mistake; `first_confirmed` tests
such predictions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tpcheck.core.causes import Explanation, first_explanation
from tpcheck.numerics.evidence import Kind, Suspect
from tpcheck.numerics.hypotheses import (
    accumulation,
    gradients,
    layout,
    optimizer,
    parts_of_sums,
    reductions,
    values,
    vocabulary,
    weights,
)
from tpcheck.numerics.hypotheses.proof import Test, first_confirmed


def explain(suspect: Suspect) -> Explanation | None:
    """Return the first cause whose test holds, or None where none does."""
    return first_explanation(suspect, applicable(suspect))


def applicable(suspect: Suspect) -> tuple[Test, ...]:
    """Return the tests for a suspect, in order."""
    return (values.not_finite,) if suspect.kind in _COMPUTED and values.loses_numbers(suspect) else TESTS[suspect.kind]


_COMPUTED: Collection[Kind] = (
    "activation",
    "input_gradient",
    "gradient",
    "update",
    "state",
    "master",
)  # weights are compared by bits

TESTS: Mapping[Kind, tuple[Test, ...]] = {
    "group": (layout.another_group,),
    "lost": (layout.parameters_lost,),
    "sharding": (layout.not_sharded, layout.shard_missing, layout.remainder_lost),
    "weight": (weights.full_weight, weights.each_rank),
    "activation": (
        accumulation.loss_divided_otherwise,
        layout.fused_blocks_interleaved,
        reductions.terms_of_output,
        reductions.times_tp,
        reductions.over_tp,
        first_confirmed(reductions.linear_hypotheses, vocabulary.embedding_hypotheses, vocabulary.loss_hypotheses),
        reductions.times_tp_on_some,
        reductions.over_tp_on_some,
        reductions.beside_an_addend,
        parts_of_sums.statistic_over_one_shard,
        layout.heads_moved,
        layout.shards_moved,
        values.all_zero,
        values.dtype_rounded,
        reductions.times_dp,
        reductions.issued_over_another_group,
    ),
    "input_gradient": (
        parts_of_sums.no_gradient_comes_back,
        gradients.vanished,
        reductions.terms_of_input_gradient,
        reductions.where_module_computed_it(reductions.times_tp),
        reductions.where_module_computed_it(reductions.over_tp),
        reductions.where_module_computed_it(reductions.times_tp_on_some),
        reductions.where_module_computed_it(reductions.over_tp_on_some),
        reductions.where_it_is_summed_backward(reductions.times_tp),
        first_confirmed(reductions.linear_hypotheses),
        parts_of_sums.without_the_sums,
        gradients.lost_on_some,
        first_confirmed(gradients.lost_branches),
        reductions.branches_reduced_otherwise,
        gradients.lost_on_ranks,
        gradients.multiple,
        values.dtype_rounded,
    ),
    "gradient": (
        parts_of_sums.no_gradient_comes_back,
        gradients.missing,
        reductions.terms_of_parameter_gradient,
        first_confirmed(accumulation.gradient_hypotheses),
        accumulation.unreduced_over_tp,
        reductions.where_replicas_are_averaged(reductions.times_dp),
        reductions.where_replicas_are_averaged(reductions.over_dp),
        first_confirmed(parts_of_sums.lost_uses),
        gradients.multiple,
        first_confirmed(
            gradients.untied_hypotheses, reductions.averaging_hypotheses, gradients.another_parameters_hypotheses
        ),
        layout.shards_moved,
        gradients.lost_on_some,
        values.dtype_rounded,
    ),
    "norm": (optimizer.skipped, optimizer.norm_of_one_group, optimizer.wrong_norm, optimizer.only_the_report_is_wrong),
    "update": (
        optimizer.skipped,
        optimizer.unlike_masters,
        first_confirmed(optimizer.step_hypotheses),
        optimizer.gradient_with_the_loss_scale,
        values.dtype_rounded,
        optimizer.clipped_by_groups,
        optimizer.clipped_with_another_epsilon,
        optimizer.clipped_by_another_norm,
        optimizer.replicas_drift_in_step,
    ),
    "state": (optimizer.state_of_another_rank, values.all_zero, gradients.multiple, values.dtype_rounded),
    "master": (
        optimizer.state_of_another_rank,
        values.all_zero,
        first_confirmed(optimizer.state_of_an_earlier_step),
        values.dtype_rounded,
    ),
    "replica": (reductions.terms_of_replicas, optimizer.replicas_drift),
    "logged": (accumulation.loss_of_one_replica,),
}
