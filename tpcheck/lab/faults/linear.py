"""Faults of row- and column-parallel layers: sums that are missing, doubled or over another group, biases, gathers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.lab.faults.fault import TP2_DP2, TP4, Draw, Injection, Live, ModelFault, Place, fault_constructor
from tpcheck.lab.faults.injection import Forward, all_gathered, all_reduced, replace_forward, with_value

_ROW = ("*.o_proj", "*.down_proj")
_ROW_WITH_BIAS = ("*.self_attn.out_proj", "*.fc2")  # of OPT

_BIAS_LINK = "https://github.com/huggingface/text-generation-inference/issues/1036"
_CONTIGUOUS_LINK = "https://github.com/NVIDIA/Megatron-LM/issues/5337"

_fault = fault_constructor("forward collectives", "outputs_match_reference", steps=1)


def _term(layer: Any, hidden: Tensor) -> Tensor:
    term: Tensor = hidden @ layer.weight.t()
    return term


def _with_bias(layer: Any, total: Tensor) -> Tensor:
    return total if layer.bias is None else total + layer.bias


def _skip_reduce(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    return term


def _reduce_twice(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    return all_reduced(all_reduced(term, layer.mp_group), layer.mp_group)


def _reduce_mean(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    return all_reduced(term, layer.mp_group) / live.tp


def _kept_on_one_rank(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    total = all_reduced(term, layer.mp_group)
    return term if live.tp_rank == tp_rank else total


def _over_pairs(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    """Sum over half of the group, as a group for nodes of two GPUs would: the terms of ranks 0, 1 and of 2, 3."""
    terms = all_gathered(term, layer.mp_group)
    first = live.tp_rank // 2 * 2
    return with_value(term, terms[first] + terms[first + 1])


def _lost_where_not_contiguous(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    strided = term.transpose(0, 1).contiguous().transpose(0, 1)
    all_reduced(strided.contiguous(), layer.mp_group)
    return strided


def _gathered_for_reduced(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    gathered = torch.cat(all_gathered(term, layer.mp_group), dim=-1)
    return with_value(term, gathered[..., : term.shape[-1]])


def _scattered_in_another_order(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    """Reduce-scatter over the sequence, then all-gather, in the reverse order of ranks."""
    return torch.cat(all_reduced(term, layer.mp_group).chunk(live.tp, dim=1)[::-1], dim=1)


def _scattered_and_not_gathered(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    """Reduce-scatter over the sequence, and repeat the rank's own part in place of the others."""
    local = all_reduced(term, layer.mp_group).chunk(live.tp, dim=1)[live.tp_rank]
    return torch.cat([local] * live.tp, dim=1)


def _not_waited_for(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    """Read a buffer during its reduction: on one rank the last rows are still the rank's own terms."""
    total = all_reduced(term, layer.mp_group)
    arrived = torch.zeros(term.shape[1], 1, dtype=torch.bool)
    arrived[: term.shape[1] // 3] = True
    return torch.where(arrived, total, term) if live.tp_rank == tp_rank else total


def _in_bfloat16(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    return with_value(term, all_reduced(term.to(torch.bfloat16), layer.mp_group).to(term.dtype))


def _reduce_over_dp(live: Live, layer: Any, tp_rank: int, term: Tensor) -> Tensor:
    return all_reduced(term, live.rank.group("dp"))


def _bias_before_reduce(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    return all_reduced(functional.linear(hidden, layer.weight, layer.bias), layer.mp_group)


def _bias_on_the_wrong_ranks(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Add the bias before the sum on all ranks but rank 0, where rank 0 alone should add it."""
    bias = layer.bias if live.tp_rank != 0 else None
    return all_reduced(functional.linear(hidden, layer.weight, bias), layer.mp_group)


def _bias_after_reduce_on_one_rank(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    total = all_reduced(_term(layer, hidden), layer.mp_group)
    return total + layer.bias if live.tp_rank == tp_rank else total


def _skipped_when_recomputed(draw: Draw) -> Injection:
    name = draw.module("*.o_proj")

    def inject(live: Live) -> None:
        layer = live.module(name)
        right = layer.forward
        is_recomputed = False

        def forward(hidden: Tensor) -> Tensor:
            nonlocal is_recomputed
            skip, is_recomputed = is_recomputed, not is_recomputed
            return _term(layer, hidden) if skip else right(hidden)

        layer.forward = forward
        live.candidate.module.gradient_checkpointing_enable({"use_reentrant": False})

    return Injection(inject, Place(modules=(name,)))


def _group_is_dp(draw: Draw) -> Injection:
    name = draw.module(*_ROW)

    def inject(live: Live) -> None:
        live.module(name).mp_group = live.rank.group("dp")

    return Injection(inject, Place())


def _row(name: str, what: str, total: Forward, *causes: str | None, biased: bool = False, **more: Any) -> ModelFault:
    """Return a fault in the sum of a row-parallel layer: `total(live, layer, tp_rank, term)` in place of it."""

    def forward(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
        return _with_bias(layer, total(live, layer, tp_rank, _term(layer, hidden)))

    patterns, family = (_ROW_WITH_BIAS, "opt") if biased else (_ROW, "llama")
    return _fault(name, what, replace_forward(forward, *patterns), *causes, family=family, **more)


def _bias(name: str, what: str, forward: Forward, *causes: str | None, **more: Any) -> ModelFault:
    return _fault(name, what, replace_forward(forward, *_ROW_WITH_BIAS), *causes, family="opt", **more)


def _columns(layer: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, layer.weight, layer.bias)


def _gathered_in_another_order(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    local = _columns(layer, hidden)
    return with_value(local, torch.cat(all_gathered(local, layer.mp_group)[::-1], dim=-1))


def _local_columns_alone(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Write the rank's columns into a buffer of zeros for all, which is then not summed over the ranks."""
    local = _columns(layer, hidden)
    return torch.cat([local if rank == live.tp_rank else torch.zeros_like(local) for rank in range(live.tp)], dim=-1)


def _local_columns_everywhere(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    return torch.cat([_columns(layer, hidden)] * live.tp, dim=-1)


def _columns_of_one_rank_lost(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Gather into a buffer of zeros which one rank's columns do not reach."""
    local = _columns(layer, hidden)
    parts = all_gathered(local, layer.mp_group)
    parts[tp_rank] = torch.zeros_like(local)
    return with_value(local, torch.cat(parts, dim=-1))


def _columns_of_one_rank_unwritten(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    """Gather into uninitialised memory which one rank's columns do not reach."""
    local = _columns(layer, hidden)
    parts = all_gathered(local, layer.mp_group)
    if live.tp_rank == tp_rank:
        parts[tp_rank - 1] = torch.full_like(local, float("nan"))
    return with_value(local, torch.cat(parts, dim=-1))


def _head(name: str, what: str, forward: Forward, *causes: str | None, **more: Any) -> ModelFault:
    return _fault(name, what, replace_forward(forward, "lm_head"), *causes, **more)


FAULTS = (
    _row("row_parallel_reduce_skipped", "a row-parallel layer returns its rank's term instead of the sum", _skip_reduce,
         "missing_reduce"),
    _row("row_parallel_reduce_skipped_beside_bias",
         "a row-parallel layer with a bias returns its rank's term instead of the sum", _skip_reduce, "missing_reduce",
         topology=TP4, biased=True),
    _row("row_parallel_term_kept_on_one_rank",
         "one rank continues with its own term, although it took part in the sum", _kept_on_one_rank, "missing_reduce",
         topology=TP4),
    _fault("row_parallel_reduce_skipped_when_recomputed",
           "activation checkpointing computes a row-parallel layer again without the sum", _skipped_when_recomputed,
           "missing_reduce"),
    _row("row_parallel_reduced_twice", "a row-parallel layer sums its terms twice", _reduce_twice, "duplicate_reduce"),
    _row("row_parallel_reduced_twice_beside_bias", "a row-parallel layer with a bias sums its terms twice",
         _reduce_twice, "duplicate_reduce", topology=TP4, biased=True),
    _row("row_parallel_mean", "a row-parallel layer averages its terms", _reduce_mean, "mean_instead_of_sum",
         topology=TP4),
    _row("row_parallel_mean_beside_bias", "a row-parallel layer with a bias averages its terms", _reduce_mean,
         "mean_instead_of_sum", biased=True),
    _row("row_parallel_reduced_over_dp", "a row-parallel layer sums over the data-parallel group", _reduce_over_dp,
         "wrong_group", topology=TP2_DP2),
    _row("row_parallel_reduced_over_half_of_the_group",
         "a row-parallel layer sums over pairs of ranks where the group has four", _over_pairs,
         "wrong_group", topology=TP4),
    _fault("tp_group_of_a_layer_is_the_dp_group",
           "a layer is given the data-parallel group for its tensor-parallel one", _group_is_dp, "wrong_group",
           checks=("groups_match_topology",), topology=TP2_DP2),
    _row("reduce_lost_on_a_copy", "the sum goes into a contiguous copy of the terms, and the terms are returned",
         _lost_where_not_contiguous, "missing_reduce", link=_CONTIGUOUS_LINK),
    _row("gathered_instead_of_reduced",
         "the ranks' terms are gathered side by side, and the first are taken for the sum", _gathered_for_reduced,
         "missing_reduce"),
    _row("reduce_scattered_in_another_order",
         "the parts of a reduce-scatter over the sequence are gathered in another order", _scattered_in_another_order,
         "shard_order_swapped", topology=TP4),
    _row("reduce_scattered_and_not_gathered",
         "every rank continues with its own part of a reduce-scatter in place of all parts",
         _scattered_and_not_gathered, "shard_repeated"),
    _row("reduce_not_waited_for", "one rank reads the sum before all of it has arrived", _not_waited_for,
         "missing_reduce"),
    _row("reduced_in_bfloat16", "the terms are rounded to bfloat16 to be summed", _in_bfloat16, "dtype_rounded"),
    _bias("bias_added_before_the_sum", "a row-parallel layer adds its bias on every rank before the sum",
          _bias_before_reduce, "bias_added_per_rank", link=_BIAS_LINK),
    _bias("bias_added_by_all_ranks_but_the_first",
          "a row-parallel layer adds its bias on the wrong side of a test for rank 0", _bias_on_the_wrong_ranks,
          "bias_added_per_rank", topology=TP4),
    _bias("bias_added_on_one_rank_after_the_sum", "one rank alone has the bias of a row-parallel layer",
          _bias_after_reduce_on_one_rank, None),
    _head("columns_gathered_in_another_order", "a column-parallel layer gathers its output in another order of ranks",
          _gathered_in_another_order, "shard_order_swapped", topology=TP4),
    _head("columns_not_gathered",
          "a column-parallel layer fills a buffer with its own columns, and the buffers are not summed",
          _local_columns_alone, "missing_reduce"),
    _head("own_columns_in_every_place", "a column-parallel layer takes its own columns for those of all ranks",
          _local_columns_everywhere, "shard_repeated"),
    _head("columns_of_one_rank_lost", "one rank's columns do not reach the gathered output, which stays zero there",
          _columns_of_one_rank_lost, "all_zero", topology=TP4),
    _head("columns_of_one_rank_unwritten", "a gathered output holds uninitialised memory on one rank",
          _columns_of_one_rank_unwritten, "not_finite"),
)  # fmt: skip
