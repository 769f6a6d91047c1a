"""The parallel styles of transformers one by one: what each replaces, and what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from tpcheck.backends.protocols import LayerTable, ParallelLayer, RankLike


def layer_table() -> LayerTable:
    """Return every style that is registered in the installed version; one that is not known here is told as such."""
    known = {layer.name: layer for layer in _LAYERS}
    unknown = "nothing is known of what it replaces"
    layers = [known.get(name, ParallelLayer(name, why_not=unknown)) for name in ALL_PARALLEL_STYLES]
    return LayerTable(layers, {}, lambda options: nullcontext(), _local)


def _styled(style: str) -> Callable[[nn.Module, RankLike], nn.Module]:
    def shard(module: nn.Module, rank: RankLike) -> nn.Module:
        mesh = DeviceMesh.from_group(rank.group("tp"), rank.device.type, mesh_dim_names=("tp",))
        for name, _ in list(module.named_parameters()):
            ALL_PARALLEL_STYLES[style].shard_param(module, name, mesh)
        sharded: nn.Module = ALL_PARALLEL_STYLES[style].install_forward(module, mesh)
        return sharded

    return shard


_NO_LAYER = "it goes around a part of a model, and shards no layer"
_LAYERS = (
    ParallelLayer("colwise", output="part", shard=_styled("colwise")),
    ParallelLayer("colwise_gather_output", shard=_styled("colwise_gather_output")),
    ParallelLayer("colwise_rep", shard=_styled("colwise_rep")),
    ParallelLayer("rowwise", input="part", shard=_styled("rowwise")),
    ParallelLayer("rowwise_split_input", shard=_styled("rowwise_split_input")),
    ParallelLayer("rowwise_rep", shard=_styled("rowwise_rep")),
    ParallelLayer("packed_colwise", output="part", shard=_styled("packed_colwise"), out_blocks=2),
    ParallelLayer("embedding_rowwise", "embedding", shard=_styled("embedding_rowwise")),
    ParallelLayer("embedding_colwise", "embedding", shard=_styled("embedding_colwise")),
    ParallelLayer("packed_rowwise", why_not="the experts that it is for multiply by themselves"),
    *(
        ParallelLayer(name, why_not=_NO_LAYER)
        for name in (
            "all_reduce",
            "ep_dispatch_experts",
            "grouped_gemm",
            "local_params",
            "mla_kv_a_proj",
            "moe_identity_expert",
            "moe_tp_experts",
            "replicate",
            "replicated_with_grad_allreduce",
            "sequence_parallel",
        )
    ),
)


def _local(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if isinstance(like, DTensor):  # an optimizer's step lays gradients so
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local().detach()
