"""The parallel styles of transformers one by one: what each replaces, and what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from tpcheck.backends.interface import NO_ROW, LayerSizes, LayerTable, ParallelLayer, RankLike
from tpcheck.backends.plain_layers import (
    NUM_EXPERTS,
    ROTARY_DIM,
    Heads,
    LatentAttention,
    Routed,
    SharedByAll,
    SortedByExpert,
)


def layer_table() -> LayerTable:
    """Return every style of the installed version; a style without a row says so in `why_not`."""
    known = {layer.name.partition(",")[0] for layer in _LAYERS}
    unknown = [ParallelLayer(name, why_not=NO_ROW) for name in ALL_PARALLEL_STYLES if name not in known]
    installed = [layer for layer in _LAYERS if layer.name.partition(",")[0] in ALL_PARALLEL_STYLES]
    return LayerTable([*installed, *unknown], {}, lambda options: nullcontext())


def _shard_as(style: str) -> Callable[[nn.Module, RankLike], nn.Module]:
    """Return a function that shards a plain layer by the style of that name."""
    return _shard_by({"": style})


def _shard_by(plan: Mapping[str, str], **of_dispatch: Any) -> Callable[[nn.Module, RankLike], nn.Module]:
    """Return a function that applies the styles of a plan to modules and parameters of these names.

    Args:
        of_dispatch: Arguments of `ep_dispatch_experts`.
    """

    def shard(module: nn.Module, rank: RankLike) -> nn.Module:
        mesh = DeviceMesh.from_group(rank.group("tp"), rank.device.type, mesh_dim_names=("tp",))
        parameters = dict(module.named_parameters())
        for name, style_name in plan.items():
            style: Any = ALL_PARALLEL_STYLES[style_name]
            if name in parameters:
                owner, _, parameter = name.rpartition(".")
                style.shard_param(module.get_submodule(owner), parameter, mesh)
                continue
            layer = module.get_submodule(name)
            for parameter, _ in list(layer.named_parameters(recurse=False)):
                if f"{name}.{parameter}".lstrip(".") not in plan:
                    style.shard_param(layer, parameter, mesh)
            if style_name == "ep_dispatch_experts":  # the ranks of the TP group have the experts, and one batch
                style.install_forward(layer, mesh, tp_mesh=mesh, **of_dispatch)
                continue
            if style_name == "mla_kv_a_proj":
                layer.config = SimpleNamespace(qk_rope_head_dim=ROTARY_DIM)  # type: ignore[assignment]
            style.install_forward(layer, mesh)
        return module

    return shard


def _experts(sizes: LayerSizes, family: str, name: str) -> nn.Module:
    """Return small experts of a family, imported when it is tried; their configuration has every family's names."""
    experts_class = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
    config = SimpleNamespace(
        hidden_size=sizes.inputs,
        hidden_act="silu",
        intermediate_size=sizes.outputs,
        moe_intermediate_size=sizes.outputs,
        expert_ffn_hidden_size=sizes.outputs,
        num_local_experts=NUM_EXPERTS,
        n_shared_experts=NUM_EXPERTS,
        n_routed_experts=NUM_EXPERTS,
        zero_expert_num=_NUM_IDENTITIES,
        _experts_implementation="eager",
    )
    experts: nn.Module = experts_class(config)
    return experts


def _mixtral(sizes: LayerSizes) -> nn.Module:
    return Routed(sizes, _experts(sizes, "mixtral", "MixtralExperts"))


_NUM_IDENTITIES = 2
_WHOLE_EXPERTS = {
    "experts.gate_up_proj": "grouped_gemm",
    "experts.down_proj": "grouped_gemm",
    "experts": "ep_dispatch_experts",
}
_CUT_EXPERTS = {
    "experts.gate_up_proj": "packed_colwise",
    "experts.down_proj": "rowwise",
    "experts": "moe_tp_experts",
}
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
    ParallelLayer("replicate", shard=_shard_as("replicate"), replicates=("",)),
    ParallelLayer(
        "sequence_parallel",
        lambda sizes: nn.LayerNorm(sizes.inputs, bias=sizes.bias),
        "rows",
        "rows",
        shard=_shard_as("sequence_parallel"),
        rows_dim=1,
        num_rows=2,
        replicates=("",),
    ),
    ParallelLayer(
        "replicated_with_grad_allreduce",
        partial(Heads, norm=True),
        shard=_shard_by({"q_proj": "colwise", "q_norm": "replicated_with_grad_allreduce", "o_proj": "rowwise"}),
        replicates=("q_norm",),
    ),
    ParallelLayer(
        "local_params",
        partial(Heads, sinks=True),
        shard=_shard_by({"q_proj": "colwise", "sinks": "colwise", "o_proj": "rowwise", "": "local_params"}),
    ),
    ParallelLayer(
        "mla_kv_a_proj",
        LatentAttention,
        shard=_shard_by({"kv_a_proj_with_mqa": "mla_kv_a_proj", "kv_b_proj": "colwise", "o_proj": "rowwise"}),
        replicates=("kv_a_proj_with_mqa",),
    ),
    ParallelLayer("moe_tp_experts", _mixtral, shard=_shard_by(_CUT_EXPERTS), replicates=("router",)),
    ParallelLayer(
        "moe_identity_expert",
        lambda sizes: Routed(
            sizes, _experts(sizes, "longcat_flash", "LongcatFlashExperts"), NUM_EXPERTS + _NUM_IDENTITIES
        ),
        shard=_shard_by({"experts.identity_expert": "moe_identity_expert", **_CUT_EXPERTS}),
        replicates=("router",),
    ),
    ParallelLayer(
        "packed_rowwise",
        lambda sizes: SortedByExpert(sizes, _experts(sizes, "llama4", "Llama4TextExperts")),
        shard=_shard_by(
            {
                "experts.gate_up_proj": "packed_rowwise",
                "experts.down_proj": "colwise",
                "experts": "moe_tp_experts",
            }
        ),
        replicates=("router",),
    ),
    ParallelLayer(
        "all_reduce",
        lambda sizes: SharedByAll(sizes, _experts(sizes, "inkling", "InklingSharedExperts")),
        shard=_shard_by(
            {
                "experts.gate_proj": "colwise",
                "experts.up_proj": "colwise",
                "experts.down_proj": "rowwise",
                "experts": "all_reduce",
            }
        ),
        replicates=("router",),
    ),
    ParallelLayer(
        "grouped_gemm",
        _mixtral,
        shard=_shard_by(_WHOLE_EXPERTS, ep_implementation="all_to_all"),
        replicates=("router",),
    ),
    ParallelLayer("ep_dispatch_experts", _mixtral, shard=_shard_by(_WHOLE_EXPERTS), replicates=("router",)),
    ParallelLayer(
        "ep_dispatch_experts, all_reduce",
        _mixtral,
        shard=_shard_by(_WHOLE_EXPERTS, ep_implementation="all_reduce"),
        replicates=("router",),
    ),
)
