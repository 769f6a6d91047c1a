"""DeepSpeed's tensor-parallel layers one by one: what each replaces, and what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
from deepspeed.module_inject import layers as of_deepspeed
from deepspeed.module_inject.tp_shard import AutoTPMeta
from torch import nn

from tpcheck.adapters.offers import LayerTable, ParallelLayer, plain_tensor
from tpcheck.adapters.protocols import RankLike

Arguments = Callable[[nn.Module], Mapping[str, Any]]
_INFERENCE = "it is for inference: its reduction has no gradient"
_YUAN = "it cuts the heads of Yuan, whose queries and keys are shared: no plain layer has such parts"


def layer_table() -> LayerTable:
    """Return every layer class of the installed version; one that is not known here is told as such."""
    return LayerTable((*_LAYERS, *_unknown()), {"tp_overlap_comm": (False, True)}, _session, plain_tensor)


def _made(name: str, arguments: Arguments = lambda module: {}) -> Callable[[nn.Module, RankLike], nn.Module]:
    def shard(module: nn.Module, rank: RankLike) -> nn.Module:
        made: nn.Module = getattr(of_deepspeed, name)(module, rank.group("tp"), name="layer", **arguments(module))
        return made

    return shard


def _fused(block: str) -> Arguments:
    """Return the arguments by which DeepSpeed recognises how a family fuses queries, keys and values."""
    fused_module = type(block, (nn.Module,), {})()
    return lambda module: {"fused_module": fused_module, "tp_meta": AutoTPMeta()}


def _in_blocks(number: int) -> Arguments:
    def arguments(module: nn.Module) -> Mapping[str, Any]:
        outputs, inputs = module.get_parameter("weight").shape
        return {"shape": (outputs, (inputs // number,) * number), "partition_dim": 1}

    return arguments


# What a layer of Phi-3 fuses is written as sizes, which need numbers of heads; that of MPT is three equal parts.
_LAYERS = (
    ParallelLayer("LinearLayer", output="part", shard=_made("LinearLayer")),
    ParallelLayer("LinearLayer, gather_output", shard=_made("LinearLayer", lambda module: {"gather_output": True})),
    ParallelLayer("LinearAllreduce", input="part", shard=_made("LinearAllreduce")),
    ParallelLayer("LinearAllreduceWithReplicatedInput", shard=_made("LinearAllreduceWithReplicatedInput")),
    ParallelLayer("GateUpPack_LinearLayer", output="part", shard=_made("GateUpPack_LinearLayer"), out_blocks=2),
    ParallelLayer("fused_LinearLayer", output="part", shard=_made("fused_LinearLayer", _fused("BloomBlock"))),
    ParallelLayer(
        "fused_LinearLayer, three parts",
        output="part",
        shard=_made("fused_LinearLayer", _fused("MptBlock")),
        out_blocks=3,
    ),
    ParallelLayer(
        "SubParamLinearLayer",
        output="part",
        shard=_made("SubParamLinearLayer", lambda module: {"shape": (3, -1)}),
        out_blocks=3,
    ),
    ParallelLayer(
        "SubParamLinearAllreduce",
        input="part",
        shard=_made("SubParamLinearAllreduce", _in_blocks(2)),
        in_blocks=2,
    ),
    ParallelLayer("VocabParallelLinear", output="part", shard=_made("VocabParallelLinear")),
    ParallelLayer("VocabParallelEmbedding", "embedding", shard=_made("VocabParallelEmbedding")),
    ParallelLayer("HiddenParallelEmbedding", "embedding", shard=_made("HiddenParallelEmbedding")),
    ParallelLayer("conv_LinearLayer", "transposed_linear", output="part", shard=_made("conv_LinearLayer")),
    ParallelLayer("Conv_LinearALlreduce", "transposed_linear", input="part", shard=_made("Conv_LinearALlreduce")),
    ParallelLayer("LmHeadLinearAllreduce", why_not=_INFERENCE),
    ParallelLayer("Yuan_LinearLayer", why_not=_YUAN),
    ParallelLayer("Yuan_LinearAllreduce", why_not=_YUAN),
    ParallelLayer("SubParamColumnParallel", why_not="it is the base of others"),
)


def _unknown() -> Iterator[ParallelLayer]:
    known = {layer.name.partition(",")[0] for layer in _LAYERS}
    for name, made in vars(of_deepspeed).items():
        is_layer = isinstance(made, type) and issubclass(made, of_deepspeed.TensorParallel_Layer)
        if is_layer and made is not of_deepspeed.TensorParallel_Layer and name not in known:
            yield ParallelLayer(name, why_not="nothing is known of what it replaces")


@contextmanager
def _session(options: Mapping[str, Any]) -> Iterator[None]:
    deepspeed.init_distributed(verbose=False)
    of_deepspeed.set_autotp_mode(training=True)
    with patch.multiple(of_deepspeed.TensorParallel_Layer, **{"tp_overlap_comm": False, **options}):
        yield
