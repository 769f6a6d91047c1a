"""The tensor-parallel layers of DeepSpeed one by one: what each replaces, and what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
from deepspeed.module_inject import layers as deepspeed_layers
from deepspeed.module_inject.tp_shard import AutoTPMeta
from torch import nn

from tpcheck.backends.interface import NO_ROW, LayerTable, ParallelLayer, RankLike

Arguments = Callable[[nn.Module], Mapping[str, Any]]
_YUAN_HEADS = 8  # values of two heads at least go to each rank, and the ranks divide the heads


def layer_table() -> LayerTable:
    """Return every layer class of the installed version; a class without a row says so in `why_not`."""
    return LayerTable((*_LAYERS, *_unknown()), {"tp_overlap_comm": (False, True)}, _session)


def _shard_as(name: str, arguments: Arguments = lambda module: {}) -> Callable[[nn.Module, RankLike], nn.Module]:
    """Return a function that shards a plain layer by the layer class of that name."""

    def shard(module: nn.Module, rank: RankLike) -> nn.Module:
        layer_class = getattr(deepspeed_layers, name)
        layer: nn.Module = layer_class(module, rank.group("tp"), name="layer", **arguments(module))
        return layer

    return shard


def _fused(block: str) -> Arguments:
    """Return the arguments by which DeepSpeed recognises how a family fuses queries, keys and values.

    It looks the class name of the block up in a table: `BloomBlock` is `bloomtype`, `MptBlock` is `glmtype`
    (deepspeed/module_inject/fusedqkv_utils.py at v0.19.8).
    """
    fused_module = type(block, (nn.Module,), {})()
    return lambda module: {"fused_module": fused_module, "tp_meta": AutoTPMeta()}


def _in_blocks(number: int) -> Arguments:
    """Return the arguments of a layer whose inputs are `number` fused blocks of one size."""

    def arguments(module: nn.Module) -> Mapping[str, Any]:
        outputs, inputs = module.get_parameter("weight").shape
        return {"shape": (outputs, (inputs // number,) * number), "partition_dim": 1}

    return arguments


def _yuan(module: nn.Module) -> Mapping[str, Any]:
    """Return the arguments of a layer of Yuan, whose ranks hold heads from both ends of the values."""
    return {"tp_meta": AutoTPMeta(num_kv_heads=_YUAN_HEADS)}


# What a layer of Phi-3 fuses is written as sizes, which need numbers of heads; that of MPT is three equal parts.
_LAYERS = (
    ParallelLayer("LinearLayer", output="part", shard=_shard_as("LinearLayer")),
    ParallelLayer("LinearLayer, gather_output", shard=_shard_as("LinearLayer", lambda module: {"gather_output": True})),
    ParallelLayer("LinearAllreduce", input="part", shard=_shard_as("LinearAllreduce")),
    ParallelLayer("LinearAllreduceWithReplicatedInput", shard=_shard_as("LinearAllreduceWithReplicatedInput")),
    ParallelLayer("GateUpPack_LinearLayer", output="part", shard=_shard_as("GateUpPack_LinearLayer"), out_blocks=2),
    ParallelLayer("fused_LinearLayer", output="part", shard=_shard_as("fused_LinearLayer", _fused("BloomBlock"))),
    ParallelLayer(
        "fused_LinearLayer, three parts",
        output="part",
        shard=_shard_as("fused_LinearLayer", _fused("MptBlock")),
        out_blocks=3,
    ),
    ParallelLayer(
        "SubParamLinearLayer",
        output="part",
        shard=_shard_as("SubParamLinearLayer", lambda module: {"shape": (3, -1)}),
        out_blocks=3,
    ),
    ParallelLayer(
        "SubParamLinearAllreduce",
        input="part",
        shard=_shard_as("SubParamLinearAllreduce", _in_blocks(2)),
        in_blocks=2,
    ),
    ParallelLayer("VocabParallelLinear", output="part", shard=_shard_as("VocabParallelLinear")),
    ParallelLayer("VocabParallelEmbedding", "embedding", shard=_shard_as("VocabParallelEmbedding")),
    ParallelLayer("HiddenParallelEmbedding", "embedding", shard=_shard_as("HiddenParallelEmbedding")),
    ParallelLayer("conv_LinearLayer", "transposed_linear", output="part", shard=_shard_as("conv_LinearLayer")),
    ParallelLayer("Conv_LinearALlreduce", "transposed_linear", input="part", shard=_shard_as("Conv_LinearALlreduce")),
    ParallelLayer("LmHeadLinearAllreduce", shard=_shard_as("LmHeadLinearAllreduce"), num_rows=2, trains=False),
    ParallelLayer(
        "Yuan_LinearLayer", output="part", shard=_shard_as("Yuan_LinearLayer", _yuan), out_blocks=_YUAN_HEADS
    ),
    ParallelLayer(
        "Yuan_LinearAllreduce", input="part", shard=_shard_as("Yuan_LinearAllreduce", _yuan), in_blocks=_YUAN_HEADS
    ),
    ParallelLayer("SubParamColumnParallel", why_not="abstract base class"),
)


def _unknown() -> Iterator[ParallelLayer]:
    """Yield a row that is not tried for each layer class that `_LAYERS` lacks."""
    known = {layer.name.partition(",")[0] for layer in _LAYERS}
    base = deepspeed_layers.TensorParallel_Layer
    for name, member in vars(deepspeed_layers).items():
        if isinstance(member, type) and issubclass(member, base) and member is not base and name not in known:
            yield ParallelLayer(name, why_not=NO_ROW)


@contextmanager
def _session(options: Mapping[str, Any]) -> Iterator[None]:
    deepspeed.init_distributed(verbose=False)
    deepspeed_layers.set_autotp_mode(training=True)
    with patch.multiple(deepspeed_layers.TensorParallel_Layer, **{"tp_overlap_comm": False, **options}):
        yield
