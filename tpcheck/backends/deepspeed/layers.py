"""DeepSpeed's tensor-parallel layers: where each keeps its elements, what it replaces, what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject import layers as of_deepspeed
from deepspeed.module_inject.tp_shard import AutoTPMeta
from torch import nn

from tpcheck.backends.layout import Layout
from tpcheck.backends.protocols import LayerTable, ParallelLayer, RankLike, plain_tensor


def parallel_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) for each layer that DeepSpeed has replaced by a tensor-parallel one."""
    for name, module in model.named_modules():
        if hasattr(module, "gather_params") and hasattr(module, "mp_group"):
            yield name, module


def layouts(model: nn.Module, group: Any) -> dict[str, Layout]:
    """Return the layout of every parameter over the TP group but those that their layer cannot gather. Collective.

    Each layer is asked to gather a shard whose values say where they come from, through its own `gather_params`: what
    comes back is the layout, whatever the layer does inside.
    """
    tp = dist.get_world_size(group)
    found = {
        name: Layout.replicated(local_shape(parameter), tp)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for prefix, layer in parallel_layers(model):
        for name, layout in _layer_layouts(layer, group).items():
            full_name = f"{prefix}.{name}" if prefix else name
            if layout is None:
                del found[full_name]
            else:
                found[full_name] = layout
    return found


def local_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of this rank's TP shard; ZeRO-3 keeps it aside while the data is partitioned over DP."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _layer_layouts(layer: Any, group: Any) -> dict[str, Layout | None]:
    parameters = {name: getattr(layer, name, None) for name in ("weight", "bias")}
    present = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(shapes, {name: local_shape(p) for name, p in present.items()}, group=group)
    tp_rank = dist.get_rank(group)
    with _data_set_aside(*present.values()):
        for name, parameter in present.items():
            sizes = [prod(by_rank[name]) for by_rank in shapes]
            start = sum(sizes[:tp_rank])
            # float64, since a parameter's data must be floating point: exact below 2**53 elements
            ids = torch.arange(start, start + sizes[tp_rank], dtype=torch.float64, device=parameter.device)
            parameter.data = ids.reshape(shapes[tp_rank][name])
        try:
            layer.gather_params(list(present.values()))  # before 0.19 a None in the place of a bias crashes
        except (
            RuntimeError
        ):  # interleaved fused layouts that DeepSpeed trains but cannot reassemble, on all ranks alike
            return dict.fromkeys(present)
        gathered = {name: parameter.data.clone() for name, parameter in present.items()}
    return {
        name: _layout(ids.to(torch.int64), tuple(by_rank[name] for by_rank in shapes)) for name, ids in gathered.items()
    }


def _layout(ids: torch.Tensor, local_shapes: tuple[tuple[int, ...], ...]) -> Layout:
    whole_on_each_rank = all(shape == tuple(ids.shape) for shape in local_shapes)
    if whole_on_each_rank:
        return Layout(tuple(ids.shape), local_shapes)
    return Layout(tuple(ids.shape), local_shapes, ids.reshape(-1).cpu())


@contextmanager
def _data_set_aside(*parameters: torch.Tensor) -> Iterator[None]:
    saved = [parameter.data for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, saved, strict=True):
            parameter.data = data


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
