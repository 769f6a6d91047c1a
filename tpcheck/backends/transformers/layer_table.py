"""The parallel styles of transformers one by one: what each replaces, and what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from tpcheck.backends.interface import NO_ROW, LayerTable, ParallelLayer, RankLike


def layer_table() -> LayerTable:
    """Return every style of the installed version; a style without a row says so in `why_not`."""
    rows = {layer.name: layer for layer in _LAYERS}
    layers = [rows.get(name, ParallelLayer(name, why_not=NO_ROW)) for name in ALL_PARALLEL_STYLES]
    return LayerTable(layers, {}, lambda options: nullcontext())


def _shard_as(style: str) -> Callable[[nn.Module, RankLike], nn.Module]:
    """Return a function that shards a plain layer by the style of that name."""

    def shard(module: nn.Module, rank: RankLike) -> nn.Module:
        mesh = DeviceMesh.from_group(rank.group("tp"), rank.device.type, mesh_dim_names=("tp",))
        for name, _ in list(module.named_parameters()):
            ALL_PARALLEL_STYLES[style].shard_param(module, name, mesh)
        sharded: nn.Module = ALL_PARALLEL_STYLES[style].install_forward(module, mesh)
        return sharded

    return shard


_NO_LAYER = "it wraps a part of a model, and shards no layer"
_LAYERS = (
    ParallelLayer("colwise", output="part", shard=_shard_as("colwise")),
    ParallelLayer("colwise_gather_output", shard=_shard_as("colwise_gather_output")),
    ParallelLayer("colwise_rep", shard=_shard_as("colwise_rep")),
    ParallelLayer("rowwise", input="part", shard=_shard_as("rowwise")),
    ParallelLayer("rowwise_split_input", shard=_shard_as("rowwise_split_input")),
    ParallelLayer("rowwise_rep", shard=_shard_as("rowwise_rep")),
    ParallelLayer("packed_colwise", output="part", shard=_shard_as("packed_colwise"), out_blocks=2),
    ParallelLayer("embedding_rowwise", "embedding", shard=_shard_as("embedding_rowwise")),
    ParallelLayer("embedding_colwise", "embedding", shard=_shard_as("embedding_colwise")),
    ParallelLayer(
        "packed_rowwise", why_not="its experts do their own matmul, so there is no plain layer to compare with"
    ),
    *(
        ParallelLayer(name, why_not=_NO_LAYER)
        for name in (
            "all_reduce ep_dispatch_experts grouped_gemm local_params mla_kv_a_proj moe_identity_expert "
            "moe_tp_experts replicate replicated_with_grad_allreduce sequence_parallel"
        ).split()
    ),
)
