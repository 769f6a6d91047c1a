"""Faults of the layout: ranks hold wrong shards, shards with wrong boundaries, or shards with wrong values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcheck.lab.faults.fault import TP2, TP2_DP2, TP4, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import inject_always

_HEAD_DIM = 8  # of the small models
_COLUMN = ("*.q_proj.weight", "*.gate_proj.weight", "*.up_proj.weight", "lm_head.weight")
_ROW = ("*.o_proj.weight", "*.down_proj.weight")
_ANY = (*_COLUMN, *_ROW, "*.k_proj.weight", "*.v_proj.weight")

_FUSED_LINK = "https://github.com/NVIDIA-NeMo/Automodel/pull/1324"
_HEAD_COUNT_LINK = "https://github.com/deepspeedai/DeepSpeed/issues/8231"
_TIED = {"tie_word_embeddings": True}
_FLOOR_SETTINGS = {"vocab_size": 131, "intermediate_size": 97}

NewShard = Callable[[Live, list[Tensor], int, int], Tensor]  # all ranks' shards, the dim that is cut, the drawn tp_rank

_fault = fault_constructor("layout", "weights_match_reference", steps=1)


def _reshard(new_shard: NewShard, dim: int, *patterns: str) -> Callable[[Draw], Injection]:
    """Return a draw of a parameter of which each rank gets another shard, computed from all ranks' shards."""

    def draw_parameter(draw: Draw) -> Injection:
        name, tp_rank = draw.parameter(*patterns), draw.tp_rank()

        def inject(live: Live) -> None:
            fill(live, name, lambda shards: new_shard(live, shards, dim, tp_rank))

        return Injection(inject, Place(parameters=(name,)))

    return draw_parameter


def fill(live: Live, name: str, new_shard: Callable[[list[Tensor]], Tensor]) -> None:
    """Overwrite the rank's shard of a parameter with values computed from all ranks' shards."""
    parameter = live.parameter(name)
    shards: list[Any] = [None] * live.tp
    dist.all_gather_object(shards, parameter.detach(), group=live.tp_group)
    with torch.no_grad():
        parameter.copy_(new_shard(shards))


def _two_swapped(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
    pair = (tp_rank, (tp_rank + 1) % live.tp)
    return shards[sum(pair) - live.tp_rank if live.tp_rank in pair else live.tp_rank]


def _one_everywhere(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
    return shards[tp_rank]


def _neighbours(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
    return shards[(tp_rank + 1) % live.tp if live.tp_rank == tp_rank else live.tp_rank]


def _rows(live: Live, shards: list[Tensor], dim: int, first: int) -> Tensor:
    """Return a slice as long as the rank's shard, from index `first` of the whole."""
    return torch.cat(shards, dim).narrow(dim, first, shards[live.tp_rank].shape[dim])


def _start(live: Live, shards: list[Tensor], dim: int) -> int:
    return sum(shard.shape[dim] for shard in shards[: live.tp_rank])


def _one_head_off(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
    later = max(1, tp_rank)
    shift = _HEAD_DIM if live.tp_rank == later else 0
    return _rows(live, shards, dim, _start(live, shards, dim) - shift)


def _rounded_down_on_the_last(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
    total = sum(shard.shape[dim] for shard in shards)
    return _rows(live, shards, dim, live.tp_rank * (total // live.tp))


def _of_another_models_heads(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
    """Cut for the six heads of another model: two on each of the first two ranks, one on the others."""
    return _rows(live, shards, dim, _HEAD_DIM * (0, 2, 4, 5)[live.tp_rank])


def _blocks_cut_one_by_one(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
    """Cut weights that interleave Q, K and V head by head as if they were three blocks."""
    blocks = torch.cat(shards, dim).chunk(3, dim)
    return torch.cat([block.chunk(live.tp, dim)[live.tp_rank] for block in blocks], dim)


def _whole_transposed(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
    return torch.cat(shards, dim).t().chunk(live.tp, dim)[live.tp_rank]


def _change(change: Callable[[Tensor], Tensor]) -> NewShard:
    """Return what changes the shard of every rank."""
    return lambda live, shards, dim, tp_rank: change(shards[live.tp_rank])


def _change_on_one_rank(change: Callable[[Tensor], Tensor]) -> NewShard:
    """Return what changes the shard of the rank that was drawn."""

    def new_shard(live: Live, shards: list[Tensor], dim: int, tp_rank: int) -> Tensor:
        shard = shards[live.tp_rank]
        return change(shard) if live.tp_rank == tp_rank else shard

    return new_shard


def _rounded(shard: Tensor) -> Tensor:
    return shard.to(torch.bfloat16).to(shard.dtype)


def _as_before_loading(shard: Tensor) -> Tensor:
    return torch.randn(shard.shape, generator=torch.Generator().manual_seed(0), dtype=shard.dtype) * 0.02


def _bit_flipped_on_one_rank(draw: Draw) -> Injection:
    name, wrong, bit = draw.parameter("*norm.weight"), draw.tp_rank(), draw.random.randrange(23)  # of the mantissa

    def inject(live: Live) -> None:
        if live.tp_rank == wrong:
            weight = live.parameter(name).data
            bits = weight.view(torch.int64 if weight.element_size() == 8 else torch.int32)
            bits[len(bits) // 2] ^= 1 << bit

    return Injection(inject, Place(parameters=(name,)))


def _of_another_layer(*, everywhere: bool) -> Callable[[Draw], Injection]:
    def draw_parameter(draw: Draw) -> Injection:
        name, tp_rank = draw.parameter("model.layers.0.*_proj.weight"), draw.tp_rank()

        def inject(live: Live) -> None:
            other = live.parameter(name.replace("layers.0", "layers.1")).detach()
            fill(live, name, lambda shards: other if everywhere or live.tp_rank == tp_rank else shards[live.tp_rank])

        return Injection(inject, Place(parameters=(name,)))

    return draw_parameter


def _keys_and_values_of_another_rank(draw: Draw) -> Injection:
    attention, tp_rank = draw.module("*.self_attn"), draw.tp_rank()
    names = tuple(f"{attention}.{letter}_proj.weight" for letter in "kv")

    def inject(live: Live) -> None:
        for name in names:
            fill(live, name, lambda shards: _two_swapped(live, shards, 0, tp_rank))

    return Injection(inject, Place(parameters=names))


def _untie_head(live: Live) -> None:
    head = live.module("lm_head")
    shards: list[Any] = [None] * live.tp
    dist.all_gather_object(shards, head.weight.detach(), group=live.tp_group)
    head.weight = nn.Parameter(shards[(live.tp_rank + 1) % live.tp].clone())


def _last_shard_lost(draw: Draw) -> Injection:
    name = draw.parameter("*.gate_proj.weight", "*.up_proj.weight")

    def inject(live: Live) -> None:
        layer = live.module(name.rpartition(".")[0])
        sizes = list(layer._partition_sizes)
        _resized(layer, [*sizes[:-1], 0], live.tp_rank)

    return Injection(inject, Place(parameters=(name,)))


def _remainder_lost(draw: Draw) -> Injection:
    name = draw.parameter("*.gate_proj.weight", "*.up_proj.weight", "lm_head.weight")

    def inject(live: Live) -> None:
        layer = live.module(name.rpartition(".")[0])
        _resized(layer, [sum(layer._partition_sizes) // live.tp] * live.tp, live.tp_rank)

    return Injection(inject, Place(parameters=(name,)))


def _resized(layer: Any, sizes: list[int], tp_rank: int) -> None:
    layer._partition_sizes = type(layer._partition_sizes)(sizes)
    layer.weight.data = layer.weight.data[: sizes[tp_rank]].clone()


FAULTS = (
    _fault("shards_swapped", "two ranks hold each other's shard of a column-parallel weight",
           _reshard(_two_swapped, 0, *_COLUMN), "shard_order_swapped"),
    _fault("two_shards_of_four_swapped", "two ranks of four hold each other's shard of a row-parallel weight",
           _reshard(_two_swapped, 1, *_ROW), "shard_order_swapped", topology=TP4),
    _fault("one_shard_everywhere", "every rank holds the same shard of a weight",
           _reshard(_one_everywhere, 0, *_COLUMN), "shard_repeated", topology=TP4),
    _fault("shard_of_the_neighbour", "one rank holds the next one's shard of a row-parallel weight",
           _reshard(_neighbours, 1, *_ROW), "shard_repeated", topology=TP4),
    _fault("boundary_off_by_one_head", "one rank's queries start one head early",
           _reshard(_one_head_off, 0, "*.q_proj.weight"), "wrong_shard_boundary"),
    _fault("row_boundary_off_by_one_head", "one rank's input features of the output projection start one head early",
           _reshard(_one_head_off, 1, "*.o_proj.weight"), "wrong_shard_boundary", topology=TP4),
    _fault("uneven_split_rounded_differently",
           "the sizes of an uneven split are rounded up, its starts are rounded down",
           _reshard(_rounded_down_on_the_last, 0, "*.gate_proj.weight", "*.up_proj.weight"), "wrong_shard_boundary",
           settings=_FLOOR_SETTINGS),
    _fault("heads_of_another_model", "the starts of the shards follow the number of heads of another model",
           _reshard(_of_another_models_heads, 0, "*.q_proj.weight"), "wrong_shard_boundary", topology=TP4,
           link=_HEAD_COUNT_LINK),
    _fault("fused_qkv_cut_by_blocks",
           "a fused QKV that goes head by head is cut as if Q, K and V lay one after the other",
           _reshard(_blocks_cut_one_by_one, 0, "*.query_key_value.weight"), "fused_blocks_interleaved",
           family="gpt_neox", link=_FUSED_LINK),
    _fault("fused_qkv_cut_by_blocks_over_four",
           "a fused QKV that goes head by head is cut as if Q, K and V lay one after the other, over four ranks",
           _reshard(_blocks_cut_one_by_one, 0, "*.query_key_value.weight"), "fused_blocks_interleaved",
           family="gpt_neox", topology=TP4, link=_FUSED_LINK),
    _fault("keys_and_values_of_another_rank",
           "keys and values are those of another rank's heads, queries are the rank's own",
           _keys_and_values_of_another_rank, "head_mapping_wrong"),
    _fault("shard_of_the_transposed_weight", "a weight is cut from its transpose",
           _reshard(_whole_transposed, 0, "*.q_proj.weight"), "transposed"),
    # of four, shards are not square
    _fault("shard_transposed", "one rank holds its shard transposed",
           _reshard(_change_on_one_rank(Tensor.t), 1, "*.down_proj.weight"), "transposed", topologies=(TP2, TP2_DP2)),
    _fault("weight_of_another_layer", "a weight is that of the next layer", _of_another_layer(everywhere=True),
           "tensor_of_another_layer"),
    _fault("shard_of_another_layer", "one rank's shard is that of the next layer", _of_another_layer(everywhere=False),
           "tensor_of_another_layer", topology=TP4),
    _fault("weight_rounded_to_bfloat16", "a weight has gone through bfloat16", _reshard(_change(_rounded), 0, *_ANY),
           "dtype_rounded"),
    _fault("shard_rounded_to_bfloat16", "one rank's shard has gone through bfloat16",
           _reshard(_change_on_one_rank(_rounded), 1, *_ROW), "dtype_rounded", topology=TP4),
    _fault("shard_never_loaded", "one rank's shard has the values from before the weights were loaded",
           _reshard(_change_on_one_rank(_as_before_loading), 0, *_ANY), None),
    _fault("shard_zero", "one rank's shard is zero",
           _reshard(_change_on_one_rank(torch.zeros_like), 1, *_ROW), "all_zero"),
    _fault("shard_uninitialised", "one rank's shard is uninitialised memory",
           _reshard(_change_on_one_rank(lambda shard: torch.full_like(shard, float("nan"))), 0, *_COLUMN),
           "not_finite"),
    _fault("bit_of_a_replica_flipped", "one bit of a norm's weight differs on one rank", _bit_flipped_on_one_rank,
           "bit_flipped", family="starcoder2"),
    _fault("embedding_of_another_rank", "the ranks hold each other's shard of a vocabulary-parallel embedding",
           _reshard(_two_swapped, 0, "model.embed_tokens.weight"), "shard_order_swapped", family="qwen3",
           settings=_TIED),
    _fault("tied_head_of_another_rank", "the head tied to the embedding is a separate tensor with another rank's shard",
           inject_always(_untie_head, modules=("lm_head",)), "shard_order_swapped",
           checks=("outputs_match_reference",), family="qwen3", settings=_TIED),
    _fault("last_shard_lost", "the last rank's shard of a weight is empty, and no other rank holds its part",
           _last_shard_lost, "shard_missing", checks=("parameters_are_sharded",), topology=TP4),
    _fault("remainder_lost", "a weight is cut into equal shards, and no rank holds the remainder", _remainder_lost,
           "wrong_shard_boundary", checks=("parameters_are_sharded",), settings=_FLOOR_SETTINGS),
)  # fmt: skip
