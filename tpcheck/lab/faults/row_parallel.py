"""Faults of the sums of row-parallel layers: missing, doubled, of another kind, over another group, beside a bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Draw, Live, ModelFault, Place, Planting
from tpcheck.lab.faults.injection import Forward, all_gathered, all_reduced, collective_fault, instead, with_value

_ROW = ("*.o_proj", "*.down_proj")
_ROW_WITH_BIAS = ("*.self_attn.out_proj", "*.fc2")  # of OPT
_TP4 = Topology(tp=4)
_TP2_DP2 = Topology(tp=2, dp=2)

_BIAS_LINK = "https://github.com/huggingface/text-generation-inference/issues/1036"
_CONTIGUOUS_LINK = "https://github.com/NVIDIA/Megatron-LM/issues/5337"


def _term(layer: Any, hidden: Tensor) -> Tensor:
    term: Tensor = hidden @ layer.weight.t()
    return term


def _with_bias(layer: Any, total: Tensor) -> Tensor:
    return total if layer.bias is None else total + layer.bias


def _skipped(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    return _with_bias(layer, _term(layer, hidden))


def _kept_on_one_rank(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    term = _term(layer, hidden)
    total = all_reduced(term, layer.mp_group)
    return _with_bias(layer, term if live.tp_rank == tp_rank else total)


def _twice(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    once = all_reduced(_term(layer, hidden), layer.mp_group)
    return _with_bias(layer, all_reduced(once, layer.mp_group))


def _mean(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    return _with_bias(layer, all_reduced(_term(layer, hidden), layer.mp_group) / live.tp)


def _over_dp(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    return _with_bias(layer, all_reduced(_term(layer, hidden), live.rank.group("dp")))


def _over_pairs(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Sum over half of the group, as a group for nodes of two GPUs would: the terms of ranks 0, 1 and of 2, 3."""
    terms = all_gathered(_term(layer, hidden), layer.mp_group)
    first = live.tp_rank // 2 * 2
    return _with_bias(layer, with_value(_term(layer, hidden), terms[first] + terms[first + 1]))


def _lost_where_not_contiguous(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    term = _term(layer, hidden).transpose(0, 1).contiguous().transpose(0, 1)
    all_reduced(term.contiguous(), layer.mp_group)
    return _with_bias(layer, term)


def _gathered_for_reduced(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    term = _term(layer, hidden)
    gathered = torch.cat(all_gathered(term, layer.mp_group), dim=-1)
    return _with_bias(layer, with_value(term, gathered[..., : term.shape[-1]]))


def _scattered_in_another_order(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Reduce-scatter over the sequence, then all-gather, in the reverse order of ranks."""
    total = all_reduced(_term(layer, hidden), layer.mp_group)
    return _with_bias(layer, torch.cat(total.chunk(live.tp, dim=1)[::-1], dim=1))


def _scattered_and_not_gathered(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Reduce-scatter over the sequence, and every rank goes on with its own part in all places."""
    total = all_reduced(_term(layer, hidden), layer.mp_group)
    own = total.chunk(live.tp, dim=1)[live.tp_rank]
    return _with_bias(layer, torch.cat([own] * live.tp, dim=1))


def _not_waited_for(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Read a buffer while it is being reduced: on one rank the last samples' rows are still its own."""
    term = _term(layer, hidden)
    total = all_reduced(term, layer.mp_group)
    arrived = torch.zeros(term.shape[1], 1, dtype=torch.bool)
    arrived[: term.shape[1] // 3] = True
    return _with_bias(layer, torch.where(arrived, total, term) if live.tp_rank == tp_rank else total)


def _in_bfloat16(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    term = _term(layer, hidden)
    rounded = all_reduced(term.to(torch.bfloat16), layer.mp_group).to(term.dtype)
    return _with_bias(layer, with_value(term, rounded))


def _bias_before_reduce(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    return all_reduced(functional.linear(hidden, layer.weight, layer.bias), layer.mp_group)


def _bias_on_the_wrong_ranks(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Leave the bias to one rank before the sum, with the test for that rank turned round."""
    bias = layer.bias if live.tp_rank != 0 else None
    return all_reduced(functional.linear(hidden, layer.weight, bias), layer.mp_group)


def _bias_after_reduce_on_one_rank(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    total = all_reduced(_term(layer, hidden), layer.mp_group)
    return total + layer.bias if live.tp_rank == tp_rank else total


def _skipped_when_recomputed(draw: Draw) -> Planting:
    name = draw.module("*.o_proj")

    def plant(live: Live) -> None:
        layer = live.module(name)
        right = layer.forward
        recomputing = False

        def forward(hidden: Tensor) -> Tensor:
            nonlocal recomputing
            now, recomputing = recomputing, not recomputing
            return _term(layer, hidden) if now else right(hidden)

        layer.forward = forward
        live.candidate.module.gradient_checkpointing_enable({"use_reentrant": False})

    return Planting(plant, Place(modules=(name,)))


def _group_is_dp(draw: Draw) -> Planting:
    name = draw.module(*_ROW)

    def plant(live: Live) -> None:
        live.module(name).mp_group = live.rank.group("dp")

    return Planting(plant, Place())


def _row(
    name: str,
    what: str,
    forward: Forward,
    causes: tuple[str | None, ...],
    topology: Topology | None = None,
    **options: Any,
) -> ModelFault:
    biased = {"family": "opt"} if options.pop("biased", False) else {}
    patterns = _ROW_WITH_BIAS if biased else _ROW
    return collective_fault(
        name, what, instead(forward, *patterns), causes, topology=topology or Topology(tp=2), **biased, **options
    )


FAULTS = (
    _row(
        "row_parallel_reduce_skipped",
        "a row-parallel layer returns its rank's term instead of the sum",
        _skipped,
        ("missing_reduce",),
    ),
    _row(
        "row_parallel_reduce_skipped_beside_bias",
        "a row-parallel layer with a bias returns its rank's term instead of the sum",
        _skipped,
        ("missing_reduce",),
        topology=_TP4,
        biased=True,
    ),
    _row(
        "row_parallel_term_kept_on_one_rank",
        "one rank goes on with its own term, though it took part in the sum",
        _kept_on_one_rank,
        ("missing_reduce",),
        topology=_TP4,
    ),
    collective_fault(
        "row_parallel_reduce_skipped_when_recomputed",
        "activation checkpointing computes a row-parallel layer again without the sum",
        _skipped_when_recomputed,
        ("missing_reduce",),
    ),
    _row(
        "row_parallel_reduced_twice",
        "a row-parallel layer sums its terms twice",
        _twice,
        ("duplicate_reduce",),
    ),
    _row(
        "row_parallel_reduced_twice_beside_bias",
        "a row-parallel layer with a bias sums its terms twice",
        _twice,
        ("duplicate_reduce",),
        topology=_TP4,
        biased=True,
    ),
    _row("row_parallel_mean", "a row-parallel layer averages its terms", _mean, ("mean_instead_of_sum",), _TP4),
    _row(
        "row_parallel_mean_beside_bias",
        "a row-parallel layer with a bias averages its terms",
        _mean,
        ("mean_instead_of_sum",),
        biased=True,
    ),
    _row(
        "row_parallel_reduced_over_dp",
        "a row-parallel layer sums over the data-parallel group",
        _over_dp,
        ("wrong_group",),
        topology=_TP2_DP2,
    ),
    _row(
        "row_parallel_reduced_over_half_of_the_group",
        "a row-parallel layer sums over pairs of ranks where the group has four",
        _over_pairs,
        ("wrong_group",),
        topology=_TP4,
    ),
    collective_fault(
        "tp_group_of_a_layer_is_the_dp_group",
        "a layer is given the data-parallel group for its tensor-parallel one",
        _group_is_dp,
        ("wrong_group",),
        checks=("groups_match_topology",),
        topology=_TP2_DP2,
    ),
    _row(
        "reduce_lost_on_a_copy",
        "the sum goes into a contiguous copy of the terms, and the terms are returned",
        _lost_where_not_contiguous,
        ("missing_reduce",),
        link=_CONTIGUOUS_LINK,
    ),
    _row(
        "gathered_instead_of_reduced",
        "the ranks' terms are gathered side by side, and the first are taken for the sum",
        _gathered_for_reduced,
        ("missing_reduce",),
    ),
    _row(
        "reduce_scattered_in_another_order",
        "the parts of a reduce-scatter over the sequence are gathered in another order",
        _scattered_in_another_order,
        ("shard_order_swapped",),
        topology=_TP4,
    ),
    _row(
        "reduce_scattered_and_not_gathered",
        "every rank goes on with its own part of a reduce-scatter in the place of all",
        _scattered_and_not_gathered,
        ("shard_repeated",),
    ),
    _row(
        "reduce_not_waited_for",
        "one rank reads the sum before all of it has arrived",
        _not_waited_for,
        ("missing_reduce",),
    ),
    _row(
        "reduced_in_bfloat16",
        "the terms are rounded to bfloat16 to be summed",
        _in_bfloat16,
        ("dtype_rounded",),
    ),
    _row(
        "bias_added_before_the_sum",
        "a row-parallel layer adds its bias on every rank before the sum",
        _bias_before_reduce,
        ("bias_added_per_rank",),
        biased=True,
        link=_BIAS_LINK,
    ),
    _row(
        "bias_added_by_all_ranks_but_the_first",
        "a row-parallel layer adds its bias on the wrong side of a test for rank 0",
        _bias_on_the_wrong_ranks,
        ("bias_added_per_rank",),
        topology=_TP4,
        biased=True,
    ),
    _row(
        "bias_added_on_one_rank_after_the_sum",
        "one rank alone has the bias of a row-parallel layer",
        _bias_after_reduce_on_one_rank,
        (None,),
        biased=True,
    ),
)
