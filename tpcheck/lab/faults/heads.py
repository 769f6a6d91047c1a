"""Faults of what is made for each head outside the weights: ALiBi, rotary tables, which keys a query meets."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Draw, Live, ModelFault, Place, Planting

_KIND = "layout"
_CHECKS = ("outputs_match_reference",)
_ALIBI_LINK = "https://github.com/bigscience-workshop/Megatron-DeepSpeed/issues/227"
_BLOOM = {"tensor_parallel": {"preset_model": "bloom"}}


def _nothing(live: Live) -> None:
    """Plant nothing: the backend's own bug is there."""


def _alibi_for_half_the_heads(draw: Draw) -> Planting:
    return Planting(_nothing, Place(modules=("transformer",)))


def _alibi_of_other_heads(*, first_everywhere: bool) -> Callable[[Draw], Planting]:
    def drawn(draw: Draw) -> Planting:
        def plant(live: Live) -> None:
            model = live.module("transformer")
            build = model.build_alibi_tensor
            taken = 0 if first_everywhere else (live.tp_rank + 1) % live.tp

            def slopes_of(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
                whole = build(mask, num_heads * live.tp, dtype)
                by_sample = whole.reshape(len(mask), live.tp, num_heads, *whole.shape[1:])
                taken_ones: Tensor = by_sample[:, taken].reshape(-1, *whole.shape[1:])
                return taken_ones

            model.build_alibi_tensor = slopes_of

        return Planting(plant, Place(modules=("transformer",)))

    return drawn


def _rotary(change: Callable[[Live, Tensor], Tensor]) -> Callable[[Draw], Planting]:
    def drawn(draw: Draw) -> Planting:
        tp_rank = draw.tp_rank()

        def plant(live: Live) -> None:
            rotary = live.module("model.rotary_emb")
            right = rotary.forward

            def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
                tables: tuple[Tensor, ...] = right(*args, **kwargs)
                return tuple(change(live, table) for table in tables) if live.tp_rank == tp_rank else tables

            rotary.forward = forward

        return Planting(plant, Place(modules=("model.rotary_emb",)))

    return drawn


def _positions_in_another_order(live: Live, table: Tensor) -> Tensor:
    return torch.cat(table.chunk(live.tp, dim=1)[::-1], dim=1)


def _later_positions(live: Live, table: Tensor) -> Tensor:
    return table.roll(-3, dims=1)


def _keys_tiled(draw: Draw) -> Planting:
    """Give query h the keys and values of head h modulo their number, where it should be h divided by the repeats."""
    name = draw.module("*.self_attn")

    def plant(live: Live) -> None:
        from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, eager_attention_forward

        def tiled(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            times = module.num_key_value_groups
            once = SimpleNamespace(num_key_value_groups=1, training=module.training)
            return eager_attention_forward(
                once, query, key.repeat(1, times, 1, 1), value.repeat(1, times, 1, 1), *args, **kwargs
            )

        ALL_ATTENTION_FUNCTIONS.register("tiled", tiled)
        attention = live.module(name)
        attention.config = copy(attention.config)
        attention.config._attn_implementation = "tiled"

    return Planting(plant, Place(modules=(name,)))


def _fused_qkv_of_another_family(draw: Draw) -> Planting:
    return Planting(_nothing, Place(modules=("model.layers.0.self_attn.query_key_value",)))


def _fault(
    name: str, what: str, draw: Callable[[Draw], Planting], causes: tuple[str | None, ...], **options: Any
) -> ModelFault:
    return ModelFault(name, _KIND, what, draw, **{"checks": _CHECKS, "causes": causes, "steps": 1, **options})


FAULTS = (
    _fault(
        "alibi_slopes_for_half_the_heads",
        "DeepSpeed's preset for bloom makes ALiBi slopes for as many heads as a rank has",
        _alibi_for_half_the_heads,
        ("head_mapping_wrong",),
        family="bloom",
        config=_BLOOM,
    ),
    _fault(
        "alibi_slopes_of_the_first_rank",
        "every rank has the ALiBi slopes of the first rank's heads",
        _alibi_of_other_heads(first_everywhere=True),
        ("head_mapping_wrong",),
        family="bloom",
        config=_BLOOM,
        link=_ALIBI_LINK,
    ),
    _fault(
        "alibi_slopes_of_another_rank",
        "every rank has the ALiBi slopes of the next rank's heads",
        _alibi_of_other_heads(first_everywhere=False),
        ("head_mapping_wrong",),
        family="bloom",
        config=_BLOOM,
        topology=Topology(tp=4),
    ),
    _fault(
        "keys_tiled_over_queries",
        "keys and values are tiled over the queries of a group where they should be repeated",
        _keys_tiled,
        ("head_mapping_wrong",),
        topologies=(Topology(tp=2), Topology(tp=2, dp=2)),  # four ranks have one head of keys each
    ),
    _fault(
        "rotary_table_in_another_order",
        "one rank's rotary table has the positions in the order of other ranks",
        _rotary(_positions_in_another_order),
        ("shard_order_swapped",),
    ),
    _fault(
        "rotary_table_of_later_positions",
        "one rank's rotary table starts a few positions late",
        _rotary(_later_positions),
        (None,),
        topology=Topology(tp=4),
    ),
    _fault(
        "fused_qkv_of_another_family",
        "DeepSpeed cuts persimmon's fused QKV in the layout of another family",
        _fused_qkv_of_another_family,
        ("fused_blocks_interleaved",),
        family="persimmon",
    ),
)
