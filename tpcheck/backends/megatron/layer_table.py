"""The tensor-parallel layers of megatron-core one by one: what each replaces, and what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.utils import GlobalMemoryBuffer
from torch import nn

from tpcheck.backends.interface import LayerSizes, LayerTable, ParallelLayer, RankLike
from tpcheck.backends.megatron.session import runs_anywhere, use_groups
from tpcheck.backends.plain_layers import HeadWithLoss

_SEQUENCE_AND_BATCH = 2  # dims before the last one, which Megatron's linear layers take
Shard = Callable[[nn.Module, RankLike], nn.Module]


def layer_table() -> LayerTable:
    """Return the layers, each with the arguments by which its callers give and take other tensors."""
    return LayerTable(_LAYERS, {}, _session)


@contextmanager
def _session(options: Mapping[str, Any]) -> Iterator[None]:
    with runs_anywhere(), patch.object(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer()):
        yield


class _AsPlain(nn.Module):
    """A layer of Megatron that takes and returns what the plain layer does, with the plain names of parameters."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self._call = call

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._call(self.layer, hidden)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.named_parameters(*args, **kwargs)


def _linear(layer_class: Any, *, sequence_parallel: bool = False, **arguments: Any) -> Shard:
    """Return a function that makes Megatron's layer of a plain one; the caller adds a bias that the layer skipped."""

    def shard(module: nn.Module, rank: RankLike) -> nn.Module:
        return _AsPlain(_cut(layer_class, module, rank, sequence_parallel=sequence_parallel, **arguments), _with_bias)

    return shard


def _with_bias(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor
    output, bias = layer(hidden)
    return output if bias is None else output + bias


def _embedding(*, scatters: bool = False) -> Shard:
    def shard(module: nn.Module, rank: RankLike) -> nn.Module:
        layer = _cut(VocabParallelEmbedding, module, rank, reduce_scatter_embeddings=scatters)
        return _AsPlain(layer, _batch_first if scatters else lambda layer, tokens: layer(tokens))

    return shard


def _batch_first(layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = layer(tokens).transpose(0, 1)  # Megatron's activations begin with the sequence
    return output


class _HeadWithVocabParallelLoss(nn.Module):
    """A head that is cut, and Megatron's loss, which spreads label smoothing over all labels but the right one."""

    def __init__(self, module: nn.Module, rank: RankLike) -> None:
        super().__init__()
        size = module.get_parameter("head.weight").shape[0]
        self._smoothing = float(module.smoothing) * (size - 1) / size  # type: ignore[arg-type]
        self._group = rank.group("tp")
        self.head = _cut(ColumnParallelLinear, module.get_submodule("head"), rank)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, _ = self.head(hidden.reshape(-1, 1, hidden.shape[-1]))
        labels = torch.arange(len(logits), device=hidden.device) % self.head.output_size
        with use_groups({"_TENSOR_MODEL_PARALLEL_GROUP": self._group}):  # it takes no group
            losses: torch.Tensor = vocab_parallel_cross_entropy(logits, labels.unsqueeze(-1), self._smoothing)
        return losses.squeeze(-1)


def _cut(
    layer_class: Any, module: nn.Module, rank: RankLike, *, sequence_parallel: bool = False, **arguments: Any
) -> Any:
    """Return Megatron's layer with this rank's part of the plain weights, as Megatron itself cuts whole weights.

    It draws whole weights in float32, so it cuts their positions, by which the part is then taken.
    """
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    config = ModelParallelConfig(
        tensor_model_parallel_size=dist.get_world_size(rank.group("tp")),
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
    )
    if layer_class is not VocabParallelEmbedding:
        arguments = {"bias": bias is not None, "skip_bias_add": False, **arguments}
        sizes = weight.shape[::-1]
    else:
        sizes = weight.shape
    positions = torch.arange(weight.numel()).reshape(weight.shape)
    layer = layer_class(
        *sizes,
        config=config,
        init_method=lambda whole: whole.copy_(positions),
        tp_group=rank.group("tp"),
        **arguments,
    )
    held = layer.weight.detach().to(torch.int64)
    layer.to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(-1)[held])
        if bias is not None:
            rows = held[:, 0] // weight.shape[1] if layer_class is ColumnParallelLinear else slice(None)
            layer.bias.copy_(bias[rows])
    layer.weight.requires_grad_(weight.requires_grad)
    return layer


def _sum_marked_gradients(module: nn.Module, rank: RankLike) -> None:
    """Sum the gradients that `finalize_model_grads` does under sequence parallelism: those of marked parameters."""
    for _, parameter in module.named_parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=rank.group("tp"))


def _frozen(sizes: LayerSizes) -> nn.Module:
    layer = nn.Linear(sizes.inputs, sizes.outputs, sizes.bias)
    layer.weight.requires_grad_(False)
    return layer


def _column(name: str, **fields: Any) -> ParallelLayer:
    return ParallelLayer(f"ColumnParallelLinear{name}", **{"output": "part", "num_rows": _SEQUENCE_AND_BATCH, **fields})


def _row(name: str, **fields: Any) -> ParallelLayer:
    return ParallelLayer(f"RowParallelLinear{name}", **{"input": "part", "num_rows": _SEQUENCE_AND_BATCH, **fields})


_RowParallel: dict[str, Any] = {"layer_class": RowParallelLinear, "input_is_parallel": True}
_LAYERS = (
    _column("", shard=_linear(ColumnParallelLinear)),
    _column(", skip_bias_add", shard=_linear(ColumnParallelLinear, skip_bias_add=True)),
    _column(", gather_output", output="whole", shard=_linear(ColumnParallelLinear, gather_output=True)),
    _column(", stride 2", shard=_linear(ColumnParallelLinear, stride=2), out_blocks=2),
    _column(", frozen weight", plain=_frozen, shard=_linear(ColumnParallelLinear)),
    _column(
        ", sequence_parallel",
        input="rows",
        shard=_linear(ColumnParallelLinear, sequence_parallel=True),
    ),
    _column(
        ", sequence_parallel, frozen weight",
        plain=_frozen,
        input="rows",
        shard=_linear(ColumnParallelLinear, sequence_parallel=True),
    ),
    _row("", shard=_linear(**_RowParallel)),
    _row(", skip_bias_add", shard=_linear(**_RowParallel, skip_bias_add=True)),
    _row(", input_is_parallel=False", input="whole", shard=_linear(RowParallelLinear, input_is_parallel=False)),
    _row(", frozen weight", plain=_frozen, shard=_linear(**_RowParallel)),
    _row(
        ", sequence_parallel",
        output="rows",
        shard=_linear(**_RowParallel, sequence_parallel=True),
        reduce_gradients=_sum_marked_gradients,
    ),
    _row(
        ", sequence_parallel, skip_bias_add",
        output="rows",
        shard=_linear(**_RowParallel, sequence_parallel=True, skip_bias_add=True),
        reduce_gradients=_sum_marked_gradients,
    ),
    ParallelLayer("VocabParallelEmbedding", "embedding", shard=_embedding()),
    ParallelLayer(
        "VocabParallelEmbedding, reduce_scatter_embeddings",
        "embedding",
        output="rows",
        shard=_embedding(scatters=True),
        rows_dim=1,
        num_rows=_SEQUENCE_AND_BATCH,
    ),
    ParallelLayer("vocab_parallel_cross_entropy", HeadWithLoss, shard=_HeadWithVocabParallelLoss),
    ParallelLayer(
        "vocab_parallel_cross_entropy, label_smoothing",
        lambda sizes: HeadWithLoss(sizes, smoothing=0.1),
        shard=_HeadWithVocabParallelLoss,
    ),
)
