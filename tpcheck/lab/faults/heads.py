"""Faults of attention outside its weights: ALiBi slopes, rotary tables, the assignment of keys to queries."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tpcheck.lab.faults.fault import TP2, TP2_DP2, TP4, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import fault_of_the_backend, inject_always, wrap_forward

_ALIBI_LINK = "https://github.com/bigscience-workshop/Megatron-DeepSpeed/issues/227"
_BLOOM = {"tensor_parallel": {"preset_model": "bloom"}}

_fault = fault_constructor("layout", "outputs_match_reference", steps=1)


def _alibi_of_other_heads(*, first_everywhere: bool) -> Callable[[Draw], Injection]:
    def inject(live: Live) -> None:
        model = live.module("transformer")
        build = model.build_alibi_tensor
        source = 0 if first_everywhere else (live.tp_rank + 1) % live.tp

        def slopes_of(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
            whole = build(mask, num_heads * live.tp, dtype)
            by_sample = whole.reshape(len(mask), live.tp, num_heads, *whole.shape[1:])
            slopes: Tensor = by_sample[:, source].reshape(-1, *whole.shape[1:])
            return slopes

        model.build_alibi_tensor = slopes_of

    return inject_always(inject, modules=("transformer",))


def _rotary(change: Callable[[Live, Tensor], Tensor]) -> Callable[[Draw], Injection]:
    """Return a draw of a rank whose rotary tables are changed."""

    def changed(live: Live, tp_rank: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tables = forward(*args, **kwargs)
        return tuple(change(live, table) for table in tables) if live.tp_rank == tp_rank else tables

    return wrap_forward(changed, "model.rotary_emb")


def _positions_in_another_order(live: Live, table: Tensor) -> Tensor:
    return torch.cat(table.chunk(live.tp, dim=1)[::-1], dim=1)


def _later_positions(live: Live, table: Tensor) -> Tensor:
    return table.roll(-3, dims=1)


def _keys_tiled(draw: Draw) -> Injection:
    """Give query h the keys and values of head `h % heads`, where it should be `h // repeats`."""
    name = draw.module("*.self_attn")

    def inject(live: Live) -> None:
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

    return Injection(inject, Place(modules=(name,)))


FAULTS = (
    _fault("alibi_slopes_for_half_the_heads",
           "DeepSpeed's preset for bloom makes ALiBi slopes for as many heads as a rank has",
           fault_of_the_backend("transformer"), "head_mapping_wrong", family="bloom", config=_BLOOM),
    _fault("alibi_slopes_of_the_first_rank", "every rank has the ALiBi slopes of the first rank's heads",
           _alibi_of_other_heads(first_everywhere=True), "head_mapping_wrong", family="bloom", config=_BLOOM,
           link=_ALIBI_LINK),
    _fault("alibi_slopes_of_another_rank", "every rank has the ALiBi slopes of the next rank's heads",
           _alibi_of_other_heads(first_everywhere=False), "head_mapping_wrong", family="bloom", config=_BLOOM,
           topology=TP4),
    # four ranks have one head of keys each
    _fault("keys_tiled_over_queries",
           "keys and values are tiled over the queries of a group where they should be repeated", _keys_tiled,
           "head_mapping_wrong", topologies=(TP2, TP2_DP2)),
    _fault("rotary_table_in_another_order", "one rank's rotary table has the positions in the order of other ranks",
           _rotary(_positions_in_another_order), "shard_order_swapped"),
    _fault("rotary_table_of_later_positions", "one rank's rotary table starts a few positions late",
           _rotary(_later_positions), None, topology=TP4),
    _fault("fused_qkv_of_another_family", "DeepSpeed cuts persimmon's fused QKV in the layout of another family",
           fault_of_the_backend("model.layers.0.self_attn.query_key_value"), "fused_blocks_interleaved",
           family="persimmon"),
)  # fmt: skip
