"""A model whose tensor parallelism is written by hand, in the styles that people use, and mistakes in such code.

Shape suffixes: B samples, L tokens, D features, F inner features, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional

from tpcheck.backends.interface import RankLike
from tpcheck.backends.sgd import Clip
from tpcheck.core.placement import Placement, Shard
from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import TP2, TP2_DP2
from tpcheck.lab.faults.injection import with_backward
from tpcheck.numerics.checks import ON_REQUEST

VOCABULARY, WIDTH, INNER, HEADS, LAYERS, LENGTH, EXPERTS = 32, 16, 32, 4, 2, 8, 4

Function = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.mean: Function = lambda squares: squares.mean(-1, keepdim=True)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return hidden_BLD * torch.rsqrt(self.mean(hidden_BLD.square()) + 1e-6) * self.weight


class _Part(nn.Module):
    """A part of a block: `enter` and `leave` are what a rank does to its input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.enter: Function = _same
        self.leave: Function = _same

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)


class Attention(_Part):
    def __init__(self, *, key_bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (self.linear(WIDTH, WIDTH) for _ in range(4))
        if key_bias:
            self.k = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        hidden_BLD = self.enter(hidden_BLD)
        q, k, v = (
            layer(hidden_BLD).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.leave(self.o(mixed.transpose(1, 2).flatten(-2)))


class Experts(nn.Module):
    """Experts whose outputs a router weighs; a rank has some of them.

    `enter` and `enter_weights` are what it does to what each expert is given, `first` is the number of its first one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH // EXPERTS) / WIDTH**0.5)
        self.out = nn.Parameter(torch.randn(EXPERTS, WIDTH // EXPERTS, WIDTH) / WIDTH**0.5)
        self.enter: Function = _same
        self.enter_router: Function = _same
        self.enter_weights: Function = _same
        self.first = 0

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        weights_BLE = self.enter_weights(self.router(self.enter_router(hidden_BLD)).softmax(-1))
        hidden_BLD = self.enter(hidden_BLD)
        inner = torch.einsum("bld,edf->blef", hidden_BLD, self.into).relu()
        own_BLE = weights_BLE[..., self.first : self.first + len(self.into)]
        return torch.einsum("blef,efd,ble->bld", inner, self.out, own_BLE)


class MLP(_Part):
    """Two layers; the second one may be a weight that code multiplies by, and experts may stand beside them."""

    def __init__(self, *, down_bias: bool, direct: bool, experts: bool) -> None:
        super().__init__()
        self.up, self.down = self.linear(WIDTH, INNER), self.linear(INNER, WIDTH)
        if down_bias:
            self.down = nn.Linear(INNER, WIDTH)
        self.norm: nn.Module | None = None
        self.direct, self.experts = direct, Experts() if experts else None

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        if self.direct:
            inner_BLF = functional.silu(self.up(self.enter(hidden_BLD)))
            return hidden_BLD + self.leave(inner_BLF @ self.down.weight.t()) + self.down.bias
        if self.experts is not None:
            inner_BLF = functional.silu(self.up(self.enter(hidden_BLD)))
            return self.leave(self.down(inner_BLF) + self.experts(hidden_BLD))
        inner_BLF = functional.silu(self.up(self.enter(hidden_BLD)))
        return self.leave(self.down(inner_BLF if self.norm is None else self.norm(inner_BLF)))


class Block(_Part):
    """Attention and MLP, one after the other, or beside each other with one reduction for both."""

    def __init__(
        self, *, beside: bool, inner_norm: bool, key_bias: bool, down_bias: bool, direct: bool, experts: bool
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(WIDTH), Attention(key_bias=key_bias)
        self.mlp_norm, self.mlp = RMSNorm(WIDTH), MLP(down_bias=down_bias, direct=direct, experts=experts)
        self.beside = beside
        if inner_norm:
            self.mlp.norm = RMSNorm(INNER)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        if self.beside:
            normed_BLD = self.enter(self.attention_norm(hidden_BLD))
            return hidden_BLD + self.leave(self.attention(normed_BLD) + self.mlp(normed_BLD))
        hidden_BLD = hidden_BLD + self.leave(self.attention(self.enter(self.attention_norm(hidden_BLD))))
        return hidden_BLD + self.leave(self.mlp(self.enter(self.mlp_norm(hidden_BLD))))


LossOfLogits = Callable[[Tensor, Tensor], Tensor]  # logits, labels


def _cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten())


class Loss(nn.Module):
    def __init__(self, of_logits: LossOfLogits) -> None:
        super().__init__()
        self.unsharded = self.of_logits = of_logits

    def forward(self, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
        return self.of_logits(logits_BLV, labels_BL)


class Model(nn.Module):
    """A language model of two blocks; `enter` stands before the head, as people write it.

    Args:
        beside, inner_norm: Of the blocks.
        key_bias: Whether keys have a bias, whose gradient is mathematically zero.
        down_bias: Whether the row-parallel layers of MLPs have one.
        direct: Whether MLPs multiply by the weight of these layers, and add the bias and a residual, themselves.
        experts: Whether MLPs have experts beside their layers.
        repeats: How often the blocks are used.
        loss: Of all logits and labels.
        passes: How often the model is called, each time with a part of the samples.
    """

    def __init__(
        self,
        *,
        beside: bool = False,
        inner_norm: bool = False,
        key_bias: bool = False,
        down_bias: bool = False,
        direct: bool = False,
        experts: bool = False,
        repeats: int = 1,
        loss: LossOfLogits = _cross_entropy,
        passes: int = 1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions_LD = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(
            Block(
                beside=beside,
                inner_norm=inner_norm,
                key_bias=key_bias,
                down_bias=down_bias,
                direct=direct,
                experts=experts,
            )
            for _ in range(LAYERS)
        )
        self.norm, self.head, self.loss = RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False), Loss(loss)
        self.repeats, self.passes = repeats, passes
        self.start: Function = _same
        self.enter: Function = _same

    def block(self, number: int) -> Any:
        return self.blocks[number]

    def all_blocks(self) -> list[Any]:
        return list(self.blocks)

    def logits(self, input_ids: Tensor) -> Tensor:
        hidden_BLD = self.start(self.embedding(input_ids) + self.positions_LD)
        for block in [*self.blocks] * self.repeats:
            hidden_BLD = block(hidden_BLD)
        logits_BLV: Tensor = self.head(self.enter(self.norm(hidden_BLD)))
        return logits_BLV

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits_BLV = torch.cat([self.logits(part) for part in input_ids.chunk(self.passes)])
        loss: Tensor = self.loss(logits_BLV, labels)
        return loss


def build(*, lora: int = 0, dora: bool = False, **options: Any) -> nn.Module:
    """Return a model, with LoRA adapters of this rank on the layers of its blocks where it is not 0, or DoRA ones."""
    model = Model(**options)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model  # takes seconds

    layers = [name.rpartition(".")[2] for name in (*COLUMN, *ROW)]
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=lora, target_modules=layers, use_dora=dora))
    return adapted


def batch(coordinate: Mapping[str, int], step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + coordinate["dp"])
    tokens_BL = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
    return {"input_ids": tokens_BL[:, :-1].contiguous(), "labels": tokens_BL[:, 1:].contiguous()}


# ---- the autograd functions that everybody writes


class _Copy(torch.autograd.Function):
    """f of Megatron-LM: identity forward, sum over the group backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Reduce(torch.autograd.Function):
    """g of Megatron-LM: sum over the group forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    """All-gather along a dim; backward the sum over the group, of which the rank keeps its part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        parts = [torch.empty_like(tensor.contiguous()) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _own_part_of_sum(gradients[0], ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    """The rank's part of the sum along a dim; backward the all-gather."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own_part_of_sum(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        parts = [torch.empty_like(gradients[0].contiguous()) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(parts, gradients[0].contiguous(), group=ctx.group)
        return torch.cat(parts, ctx.dim), None, None


def _own_part_of_sum(tensor: Tensor, group: Any, dim: int) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def copied(group: Any) -> Function:
    return lambda tensor: _Copy.apply(tensor, group)  # type: ignore[no-untyped-call]


def reduced(group: Any) -> Function:
    return lambda tensor: _Reduce.apply(tensor, group)  # type: ignore[no-untyped-call]


class _VocabularyParallelLoss(torch.autograd.Function):
    """Cross entropy of logits of which each rank has a part of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits_BLV: Tensor, labels_BL: Tensor, group: Any) -> Tensor:
        label_BL, is_local_BL, local_BL = label_logit(logits_BLV, labels_BL, group)
        dist.all_reduce(label_BL, group=group)
        sums_BL = logits_BLV.exp().sum(-1)
        dist.all_reduce(sums_BL, group=group)
        ctx.save_for_backward(logits_BLV.exp() / sums_BL[..., None], is_local_BL, local_BL)
        return (sums_BL.log() - label_BL).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        softmax_BLV, is_local_BL, local_BL = ctx.saved_tensors
        hot_BLV = functional.one_hot(local_BL, softmax_BLV.shape[-1]) * is_local_BL[..., None]
        return gradients[0] * (softmax_BLV - hot_BLV) / local_BL.numel(), None, None


def label_logit(logits_BLV: Tensor, labels_BL: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the label's logit where this rank has it, else 0; where that is; and its index among the rank's logits."""
    size = logits_BLV.shape[-1]
    local_BL = labels_BL - dist.get_rank(group) * size
    is_local_BL = (local_BL >= 0) & (local_BL < size)
    local_BL = local_BL.clamp(0, size - 1)
    return logits_BLV.gather(-1, local_BL[..., None])[..., 0] * is_local_BL, is_local_BL, local_BL


# ---- sharding


Layouts = Mapping[str, Placement]
COLUMN, ROW = ("attention.q", "attention.k", "attention.v", "mlp.up"), ("attention.o", "mlp.down")
LAYOUT: Layouts = {
    **{f"blocks.*.{name}.weight": Shard(0) for name in (*COLUMN, "mlp.norm")},
    "blocks.*.attention.k.bias": Shard(0),
    **{f"blocks.*.{name}.weight": Shard(1) for name in ROW},
    "head.weight": Shard(0),
    **{f"blocks.*.mlp.experts.{name}": Shard(0) for name in ("into", "out")},
    # The same inside a model of peft: an adapter's half is cut on the side on which its layer is.
    "base_model.model.head.weight": Shard(0),
    **{
        f"*.{name}.{part}.weight": Shard(0)
        for name in COLUMN
        for part in ("base_layer", "lora_B.*", "lora_magnitude_vector.*")
    },
    **{f"*.{name}.{part}.weight": Shard(1) for name in ROW for part in ("base_layer", "lora_A.*")},
}
WHOLE_PARTS = (
    *(f"*.{name}.lora_A.*" for name in COLUMN),
    *(f"*.{name}.{part}.*" for name in ROW for part in ("lora_B", "lora_magnitude_vector")),
)
"""Parts of adapters that every rank holds, and of whose gradient each has a term."""


def layout_of(name: str, shape: tuple[int, ...]) -> Placement | None:
    return next((placement for pattern, placement in LAYOUT.items() if fnmatchcase(name, pattern)), None)


def cut_weights(model: nn.Module, rank: RankLike) -> None:
    """Leave on each rank its part of every parameter that `LAYOUT` cuts."""
    tp_rank = rank.topology.coordinate(rank.rank)["tp"]
    for name, parameter in list(model.named_parameters()):
        placement = layout_of(name, tuple(parameter.shape))
        if isinstance(placement, Shard):
            part = parameter.detach().chunk(rank.topology.tp, placement.dim)[tp_rank]
            module, _, last = name.rpartition(".")
            shard = nn.Parameter(part.clone(), parameter.requires_grad)
            shard.tensor_model_parallel = True  # type: ignore[attr-defined]
            setattr(model.get_submodule(module), last, shard)


Style = Callable[[Model, RankLike], None]  # puts the collectives of right tensor parallelism into a cut model


def _parts(model: Model) -> list[_Part]:
    return [part for block in model.all_blocks() for part in (block.attention, block.mlp)]


def _whole_vocabulary(model: Model, group: Any) -> None:
    """Compute the loss over the ranks' parts of the vocabulary."""
    model.loss.of_logits = lambda logits, labels: _VocabularyParallelLoss.apply(  # type: ignore[no-untyped-call]
        logits, labels, group
    )


def inside(model: Model, rank: RankLike) -> None:
    """Call f and g in the forward of each attention and MLP, and f in the root's, before the head."""
    group = rank.group("tp")
    for part in _parts(model):
        part.enter, part.leave = copied(group), reduced(group)
    model.enter = copied(group)
    _whole_vocabulary(model, group)


def beside_experts(model: Model, rank: RankLike) -> None:
    """Give experts their part of what a router, which every rank has whole, weighs; sum them with the row layer's."""
    inside(model, rank)
    group, tp_rank = rank.group("tp"), rank.topology.coordinate(rank.rank)["tp"]
    for block in model.all_blocks():
        experts = block.mlp.experts
        experts.enter = experts.enter_weights = copied(group)
        experts.first = tp_rank * len(experts.into)


def _first_experts_everywhere(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.experts.first = 0


def _router_behind_copy(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.experts.enter_router = copied(rank.group("tp"))


def _experts_without_copy(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.experts.enter = _same


def _residual_in_the_sum(model: Model, rank: RankLike) -> None:
    mlp = model.block(0).mlp
    mlp.forward = lambda hidden_BLD: (
        mlp.leave(hidden_BLD + functional.silu(mlp.up(mlp.enter(hidden_BLD))) @ mlp.down.weight.t()) + mlp.down.bias
    )


def _bias_in_the_sum(model: Model, rank: RankLike) -> None:
    mlp = model.block(0).mlp
    mlp.forward = lambda hidden_BLD: hidden_BLD + mlp.leave(mlp.down(functional.silu(mlp.up(mlp.enter(hidden_BLD)))))


def inside_adapters(model: Any, rank: RankLike) -> None:
    """Call f and g in the model inside one of peft, and sum the squares of the norms of DoRA's row-parallel layers."""
    inside(model.get_base_model(), rank)
    for name, module in model.named_modules():
        if any(fnmatchcase(name, f"*.{row}.lora_magnitude_vector.default") for row in ROW):
            module.get_weight_norm = partial(_norm_of_rows, rank.group("tp"))


def _norm_of_rows(group: Any, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str) -> Tensor:
    """Return DoRA's norm of each row of a weight of which every rank has some columns."""
    return _sum((weight + scaling * lora_weight).detach().square().sum(1), group).sqrt()


def _whole_parts_reduced(*left_out: str) -> Style:
    """Return what sums the gradients of the parts of adapters that every rank holds, but of those left out."""

    def reduce(model: nn.Module, rank: RankLike) -> None:
        group = rank.group("tp")
        for name, parameter in model.named_parameters():
            is_whole = any(fnmatchcase(name, pattern) for pattern in WHOLE_PARTS)
            if is_whole and not any(fnmatchcase(name, pattern) for pattern in left_out):
                parameter.register_hook(lambda gradient: _sum(gradient, group))  # type: ignore[no-untyped-call]

    return reduce


adapters_reduced = _whole_parts_reduced()
adapters_reduced.__name__ = "adapters_reduced"


def _dora_norm_of_one_shard(model: Any, rank: RankLike) -> None:
    adapters_reduced(model, rank)
    del model.get_submodule(_DORA_NORM).get_weight_norm


def bias_after_sum(model: Model, rank: RankLike) -> None:
    """Leave the bias of the MLPs' row-parallel layers to the MLP, which adds it to the sum."""
    for block in model.all_blocks():
        block.mlp.down.forward = partial(_linear_without_bias, block.mlp.down)
        block.mlp.leave = partial(_with_bias, block.mlp.down, block.mlp.leave)


def _linear_without_bias(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, layer.weight)


def _with_bias(layer: nn.Linear, leave: Function, terms: Tensor) -> Tensor:
    return leave(terms) + layer.bias


def around(model: Model, rank: RankLike) -> None:
    """Call f and g in the forward of each block, around attention and MLP."""
    group = rank.group("tp")
    for block in model.all_blocks():
        block.enter, block.leave = copied(group), reduced(group)
    model.enter = copied(group)
    _whole_vocabulary(model, group)


def in_hooks(model: Model, rank: RankLike) -> None:
    """Call f in pre-hooks of column-parallel layers and the head, g in forward hooks of row-parallel layers."""
    group = rank.group("tp")
    f, g = copied(group), reduced(group)
    for name, module in model.named_modules():
        if name == "head" or name.endswith(COLUMN):
            module.register_forward_pre_hook(lambda module, args: tuple(map(f, args)))
        if name.endswith(ROW):
            module.register_forward_hook(lambda module, args, output: g(output))
    _whole_vocabulary(model, group)


def redistributed(model: Model, rank: RankLike) -> None:
    """Let DTensor reduce between plain modules."""
    group = rank.group("tp")
    mesh = DeviceMesh.from_group(group, "cpu")

    def f(tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, mesh, [Replicate()]).to_local(grad_placements=[Partial()])

    def g(tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()

    for part in _parts(model):
        part.enter, part.leave = f, g
    model.enter = f
    _whole_vocabulary(model, group)


def along_the_sequence(model: Model, rank: RankLike) -> None:
    """Cut the sequence between attention and MLP: gather before column-, reduce-scatter after row-parallel layers."""
    group = rank.group("tp")
    for part in _parts(model):
        part.enter = lambda tensor: _Gather.apply(tensor, group, 1)  # type: ignore[no-untyped-call]
        part.leave = lambda tensor: _ReduceScatter.apply(tensor, group, 1)  # type: ignore[no-untyped-call]
    model.start = lambda tensor: _OwnPart.apply(tensor, group, 1)  # type: ignore[no-untyped-call]
    model.enter = lambda tensor: _Gather.apply(tensor, group, 1)  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.register_hook(lambda gradient: _sum(gradient, group))  # type: ignore[no-untyped-call]
    _whole_vocabulary(model, group)


class _OwnPart(torch.autograd.Function):
    """The rank's part along a dim; backward the all-gather."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        parts = [torch.empty_like(gradients[0].contiguous()) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(parts, gradients[0].contiguous(), group=ctx.group)
        return torch.cat(parts, ctx.dim), None, None


def _sum(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


# ---- mistakes


def _loss_scaled(model: Model, rank: RankLike) -> None:
    """Multiply the gradient of the loss by 1.5, as a wrong loss scale does."""
    model.loss.register_forward_hook(lambda module, args, loss: with_backward(loss, lambda gradient: 1.5 * gradient))


def _copy_left_out(model: Model, rank: RankLike) -> None:
    model.block(0).mlp.enter = _same


def _reduce_left_out(model: Model, rank: RankLike) -> None:
    model.block(0).mlp.leave = _same


def _summed_over_dp(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.leave = reduced(rank.group("dp"))


class _LogSoftmax(torch.autograd.Function):
    """Logarithm of the softmax over the ranks' parts, whose backward returns the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, logits_BLV: Tensor, group: Any) -> Tensor:
        return logits_BLV - _sum(logits_BLV.exp().sum(-1, keepdim=True), group).log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _log_softmax_with_identity_backward(model: Model, rank: RankLike) -> None:
    group = rank.group("tp")

    def loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
        log_BLV: Tensor = _LogSoftmax.apply(logits_BLV, group)  # type: ignore[no-untyped-call]
        return -reduced(group)(label_logit(log_BLV, labels_BL, group)[0]).mean()

    model.loss.of_logits = loss


def _reduced_unseen(group: Any) -> Function:
    """Return a sum that autograd does not see."""
    return lambda tensor: _sum(tensor.detach(), group)


def _reduced_detached(group: Any) -> Function:
    """Return the right sum, g of Megatron-LM, of what is cut off before it."""
    return lambda tensor: reduced(group)(tensor.detach())


def _summed_both_ways(group: Any) -> Function:
    """Return a sum over the group that sums the gradient, too, as `torch.distributed.nn.functional.all_reduce` does."""
    return lambda tensor: _SumBothWays.apply(tensor, group)  # type: ignore[no-untyped-call]


def _mlp_summed_both_ways(model: Model, rank: RankLike) -> None:
    model.block(0).mlp.leave = _summed_both_ways(rank.group("tp"))


def _loss_with(wrong_sum: str, wrongly: Callable[[Any], Function] = _reduced_unseen) -> Style:
    """Return a mistake: a loss whose label's logit, or sum of exponentials, is summed by `wrongly(group)`."""

    def inject(model: Model, rank: RankLike) -> None:
        group = rank.group("tp")
        sums = {name: wrongly(group) if name == wrong_sum else reduced(group) for name in ("label", "sum")}

        def loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
            label_BL = sums["label"](label_logit(logits_BLV, labels_BL, group)[0])
            sums_BL = sums["sum"](logits_BLV.exp().sum(-1))
            return (sums_BL.log() - label_BL).mean()

        model.loss.of_logits = loss

    return inject


def largest_subtracted(model: Model, rank: RankLike) -> None:
    """Subtract the largest logit over the ranks before exponentials are taken: detached, as is its right."""
    group = rank.group("tp")

    def loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
        largest_BL = logits_BLV.detach().amax(-1)
        dist.all_reduce(largest_BL, op=dist.ReduceOp.MAX, group=group)
        logits_BLV = logits_BLV - largest_BL[..., None]
        label_BL = reduced(group)(label_logit(logits_BLV, labels_BL, group)[0])
        return (reduced(group)(logits_BLV.exp().sum(-1)).log() - label_BL).mean()

    model.loss.of_logits = loss


def _unseen_reduction(model: Model, rank: RankLike) -> None:
    """Reduce the output of a row-parallel layer, cut off from its terms."""
    group = rank.group("tp")
    layer = model.block(1).mlp.down

    def forward(hidden_BLF: Tensor) -> Tensor:
        total = functional.linear(hidden_BLF, layer.weight).detach()
        dist.all_reduce(total, group=group)
        return total

    layer.forward = forward
    model.block(1).mlp.leave = _same


def _norms_over(seen: bool, whole: bool, detached: bool = False) -> Style:
    """Give the norms inside the MLPs a mean of squares over all ranks, seen by autograd or not, or over one."""

    def inject(model: Model, rank: RankLike) -> None:
        group = rank.group("tp")

        def mean(squares_BLF: Tensor) -> Tensor:
            local = squares_BLF.mean(-1, keepdim=True)
            if not whole:
                return local
            if detached:
                local = local.detach()
            if seen:
                return _SumBothWays.apply(local, group) / dist.get_world_size(group)  # type: ignore[no-untyped-call,no-any-return]
            kept = local.detach().clone()
            dist.all_reduce(kept, group=group)
            return kept / dist.get_world_size(group)

        for block in model.all_blocks():
            block.mlp.norm.mean = mean

    return inject


class _SumBothWays(torch.autograd.Function):
    """The sum over the group; each rank's gradient is a term, which is summed, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], ctx.group), None


class _LastUse(torch.autograd.Function):
    """A linear layer whose backward writes the weight's gradient into a buffer in place of adding it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, written: dict[str, int]) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.written = written
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        is_first = not ctx.written.get("times")
        ctx.written["times"] = ctx.written.get("times", 0) + 1
        product = gradients[0].flatten(0, -2).t() @ hidden.flatten(0, -2)
        return gradients[0] @ weight, product if is_first else None, None


def _second_use_lost(model: Model, rank: RankLike) -> None:
    """Let the weight's gradient be that of the use whose backward runs first."""
    layer = model.block(0).mlp.up
    written: dict[str, int] = {}
    layer.forward = lambda hidden: _LastUse.apply(hidden, layer.weight, written)  # type: ignore[no-untyped-call]


def compiled(model: Model, rank: RankLike) -> None:
    """Compile each MLP; `backend="eager"` needs no C++ compiler."""
    inside(model, rank)
    for block in model.all_blocks():
        block.mlp.compile(backend="eager")


def compiled_whole(model: Model, rank: RankLike) -> None:
    """Compile the model; collectives inside autograd functions break its graph into parts."""
    inside(model, rank)
    model.compile(backend="eager")


def _scaled_beside_a_metric(model: Model, rank: RankLike) -> None:
    """Multiply the output of a norm that also averages a metric over the data-parallel group, as is its right."""
    group = rank.group("dp")

    def forward(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        metric = output.detach().square().mean()
        dist.all_reduce(metric, group=group)
        return 1.5 * output

    model.norm.register_forward_hook(forward)


def _detached_between_modules(model: Model, rank: RankLike) -> None:
    """Reduce what a layer returns in its parent's forward, cut off from its terms."""
    model.block(1).mlp.leave = _reduced_unseen(rank.group("tp"))


def _detached_before_reduction(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.leave = _reduced_detached(rank.group("tp"))


def _cut_features(tensor: Tensor) -> Tensor:
    """Cut a quarter of the features out of the backward pass."""
    kept = tensor.shape[-1] // 4
    return torch.cat([tensor[..., :kept].detach(), tensor[..., kept:]], -1)


def _features_detached_before_reduction(model: Model, rank: RankLike) -> None:
    leave = model.block(1).mlp.leave
    model.block(1).mlp.leave = lambda tensor: leave(_cut_features(tensor))


def _features_detached_before_copy(model: Model, rank: RankLike) -> None:
    enter = model.block(1).mlp.enter
    model.block(1).mlp.enter = lambda tensor: enter(_cut_features(tensor))


def _residual_detached_on_one_rank(model: Model, rank: RankLike) -> None:
    """Let one rank add to a detached input; it takes part in every collective."""
    if rank.topology.coordinate(rank.rank)["tp"] == 1:
        block = model.block(1)
        block.forward = lambda hidden_BLD: hidden_BLD.detach() - hidden_BLD + type(block).forward(block, hidden_BLD)


def _queries_detached_on_one_rank(model: Model, rank: RankLike) -> None:
    if rank.topology.coordinate(rank.rank)["tp"] == 1:
        layer = model.block(0).attention.q
        layer.forward = lambda hidden_BLD: functional.linear(hidden_BLD.detach(), layer.weight)


# ---- rows


@dataclass(frozen=True, slots=True)
class HandWrittenFault:
    """A mistake in tensor parallelism that is written by hand.

    Attributes:
        name: Its slug.
        what: What is wrong, in one sentence.
        inject: Puts the mistake into the model, after `style`; called on every rank.
        places: The modules that hold it; all findings that follow from nothing else must point there.
        causes: The right causes of those findings.
        checks: The checks that may report them.
        style: The right code around it.
        options: Of the `Model`.
        topology: The topology of the run.
        note: What the first finding's note must say, if anything.
        link: An upstream issue that reports such a bug.
        kind: The part of training that it is in.
        clip: How gradients are clipped, in place of not at all.
    """

    name: str
    what: str
    inject: Style
    places: tuple[str, ...]
    causes: tuple[str | None, ...]
    checks: tuple[str, ...] = ("gradients_match_reference",)
    style: Style = inside
    options: Mapping[str, Any] = field(default_factory=dict)
    topology: Topology = TP2
    note: str = ""
    link: str | None = None
    kind: str = "hand-written TP"
    clip: Clip | None = None

    @property
    def control(self) -> HandWrittenControl:
        """The model with the mistake in it."""
        on_request = self.checks if set(self.checks) <= set(ON_REQUEST) else None
        return HandWrittenControl(
            self.style, self.options, self.topology, also=self.inject, checks=on_request, clip=self.clip
        )


@dataclass(frozen=True, slots=True)
class HandWrittenControl:
    """Right tensor parallelism that is written by hand.

    Attributes:
        style: Where its collectives are.
        options: Of the `Model`.
        topology: The topology of the run.
        also: What else is done to the model.
        checks: The checks to run; None for the default ones.
        clip: How gradients are clipped, in place of not at all.
    """

    style: Style
    options: Mapping[str, Any] = field(default_factory=dict)
    topology: Topology = TP2
    also: Style | None = None
    checks: tuple[str, ...] | None = None
    clip: Clip | None = None

    @property
    def name(self) -> str:
        names = [function for function in (self.style, self.also, self.clip) if function is not None]
        options = (f"{name}={getattr(value, '__name__', value)}" for name, value in self.options.items())
        return " ".join(
            ["hand-written", *(function.__name__.strip("_") for function in names), *options, *(self.checks or ())]
        )

    def shard(self, model: Model, rank: RankLike) -> None:
        cut_weights(model, rank)
        self.style(model, rank)
        if self.also is not None:
            self.also(model, rank)


_FORWARD = ("outputs_match_reference",)
_SUMS_BOTH_WAYS = "https://github.com/pytorch/pytorch/issues/121587"
_INNER_NORM, _EXPERTS, _DIRECT = {"inner_norm": True}, {"experts": True}, {"direct": True, "down_bias": True}
_BLOCKS = "base_model.model.blocks"
_DORA_NORM = f"{_BLOCKS}.0.mlp.down.lora_magnitude_vector.default"
_NORMS_IN_MLPS = ("blocks.0.mlp.norm", "blocks.1.mlp.norm")
whole_statistic = _norms_over(seen=True, whole=True)
whole_statistic.__name__ = "whole_statistic"

FAULTS = (
    HandWrittenFault("hand_written_loss_scaled",
                     "the gradient of the loss has another scale, and blocks sum outside of their linear layers",
                     _loss_scaled, ("loss",), ("gradient_scaled",), style=around),
    HandWrittenFault("hand_written_loss_scaled_beside",
                     "the gradient of the loss has another scale, and attention and MLP are summed at once",
                     _loss_scaled, ("loss",), ("gradient_scaled",), style=around, options={"beside": True}),
    HandWrittenFault("hand_written_copy_left_out", "an MLP leaves out f: its input gradient is not summed",
                     _copy_left_out, ("blocks.0.mlp", "blocks.0.mlp.up"), ("missing_reduce",)),
    HandWrittenFault("hand_written_reduce_left_out", "an MLP leaves out g: its output is not summed", _reduce_left_out,
                     ("blocks.0.mlp", "blocks.0.mlp.down"), ("missing_reduce",), checks=_FORWARD),
    HandWrittenFault("hand_written_sum_over_dp", "an MLP sums its output over the data-parallel group", _summed_over_dp,
                     ("blocks.1.mlp", "blocks.1.mlp.down"), ("wrong_group",), checks=_FORWARD, topology=TP2_DP2),
    HandWrittenFault("log_softmax_with_identity_backward",
                     "the backward of a log-softmax over the ranks' vocabulary returns the gradient as it is",
                     _log_softmax_with_identity_backward, ("loss",), ("collective_without_backward",)),
    HandWrittenFault("label_logit_reduced_unseen", "the logit of the label is reduced where autograd does not see it",
                     _loss_with("label"), ("loss",), ("collective_without_backward",)),
    HandWrittenFault("sum_of_exponentials_reduced_unseen",
                     "the sum of exponentials is reduced where autograd does not see it", _loss_with("sum"), ("loss",),
                     ("collective_without_backward",)),
    HandWrittenFault("label_logit_detached", "the logit of the label is detached before it is reduced",
                     _loss_with("label", _reduced_detached), ("loss",), ("collective_without_backward",)),
    HandWrittenFault("sum_of_exponentials_detached", "the sum of exponentials is detached before it is reduced",
                     _loss_with("sum", _reduced_detached), ("loss",), ("collective_without_backward",)),
    HandWrittenFault("label_logit_reduced_again_backward",
                     "the logit of the label is reduced by a sum that sums its gradient, too",
                     _loss_with("label", _summed_both_ways), ("loss",), ("duplicate_reduce",), link=_SUMS_BOTH_WAYS),
    HandWrittenFault("reduced_again_backward", "an MLP is reduced by a sum that sums its gradient, too",
                     _mlp_summed_both_ways, ("blocks.0.mlp", "blocks.0.mlp.down"), ("duplicate_reduce",),
                     link=_SUMS_BOTH_WAYS),
    HandWrittenFault("row_parallel_reduced_unseen", "a row-parallel layer reduces its detached output",
                     _unseen_reduction, ("blocks.1.mlp.down",), ("collective_without_backward",)),
    HandWrittenFault("reduced_unseen_between_modules", "an MLP reduces the detached output of its row-parallel layer",
                     _detached_between_modules, ("blocks.1.mlp", "blocks.1.mlp.down"),
                     ("collective_without_backward",)),
    HandWrittenFault("statistic_reduced_unseen",
                     "norms over cut features reduce their mean square where autograd does not see it",
                     _norms_over(seen=False, whole=True), _NORMS_IN_MLPS, ("collective_without_backward",),
                     options=_INNER_NORM),
    HandWrittenFault("statistic_detached", "norms over cut features detach their mean square before it is reduced",
                     _norms_over(seen=True, whole=True, detached=True), _NORMS_IN_MLPS,
                     ("collective_without_backward",), options=_INNER_NORM),
    HandWrittenFault("detached_between_modules", "an MLP detaches the output of its row-parallel layer before g",
                     _detached_before_reduction, ("blocks.1.mlp", "blocks.1.mlp.down"), ("gradient_missing",)),
    HandWrittenFault("features_detached_before_reduction", "some features are detached before g, others are not",
                     _features_detached_before_reduction, ("blocks.1.mlp", "blocks.1.mlp.down"),
                     ("gradient_missing",)),
    HandWrittenFault("features_detached_before_copy", "some features are detached before f, others are not",
                     _features_detached_before_copy, ("blocks.1.mlp", "blocks.1.mlp_norm"), ("gradient_missing",)),
    HandWrittenFault("residual_detached_on_one_rank", "one rank adds a block's output to a detached input",
                     _residual_detached_on_one_rank, ("blocks.1",), ("gradient_missing",)),
    HandWrittenFault("queries_detached_on_one_rank", "one rank computes queries of a detached input",
                     _queries_detached_on_one_rank, ("blocks.0.attention", "blocks.0.attention.q"),
                     ("gradient_missing",)),
    HandWrittenFault("statistic_over_one_shard", "norms in two layers take the mean square of one rank's features",
                     _norms_over(seen=True, whole=False), _NORMS_IN_MLPS, ("statistic_over_one_shard",),
                     checks=_FORWARD, options=_INNER_NORM),
    HandWrittenFault("second_use_lost", "a layer is used twice, and its gradient is that of one use", _second_use_lost,
                     ("blocks.0.mlp.up",), ("use_of_module_lost",), options={"repeats": 2}),
    HandWrittenFault("hand_written_lora_a_unreduced",
                     "each rank keeps its term of the gradient of A, behind which B is cut",
                     _whole_parts_reduced("*.blocks.0.attention.q.lora_A.*"),
                     (f"{_BLOCKS}.0.attention.q.lora_A.default", f"{_BLOCKS}.0.attention.q.lora_B.default"),
                     ("partial_gradient_on_replica", "missing_reduce"),
                     style=inside_adapters, options={"lora": 2}),
    HandWrittenFault("hand_written_lora_b_unreduced",
                     "each rank keeps its term of the gradient of B, before which A is cut",
                     _whole_parts_reduced("*.blocks.1.mlp.down.lora_B.*"),
                     (f"{_BLOCKS}.1.mlp.down.lora_B.default",), ("partial_gradient_on_replica",),
                     style=inside_adapters, options={"lora": 2}),
    HandWrittenFault("dora_norm_of_one_shard",
                     "a row-parallel layer of DoRA divides by the norm of one rank's columns of its weight",
                     _dora_norm_of_one_shard, (_DORA_NORM,), (None,), checks=_FORWARD, style=inside_adapters,
                     options={"lora": 2, "dora": True}),
    HandWrittenFault("direct_reduce_left_out", "an MLP that multiplies by a weight itself leaves out g",
                     _reduce_left_out, ("blocks.0.mlp",), ("missing_reduce",), checks=_FORWARD, options=_DIRECT),
    HandWrittenFault("residual_in_the_sum", "an MLP adds the residual on every rank, before g", _residual_in_the_sum,
                     ("blocks.0.mlp",), ("duplicate_reduce",), checks=_FORWARD, options=_DIRECT),
    HandWrittenFault("bias_in_the_sum", "an MLP adds the bias on every rank, before g", _bias_in_the_sum,
                     ("blocks.0.mlp",), ("bias_added_per_rank",), checks=_FORWARD, options=_DIRECT),
    HandWrittenFault("first_experts_everywhere", "every rank takes its experts for the first ones",
                     _first_experts_everywhere, ("blocks.1.mlp", "blocks.1.mlp.experts"), (None,), checks=_FORWARD,
                     style=beside_experts, options=_EXPERTS),
    HandWrittenFault("router_behind_copy", "the gradient of a router, whole on every rank, is summed",
                     _router_behind_copy, ("blocks.1.mlp.experts", "blocks.1.mlp.experts.router"),
                     ("duplicate_reduce",), style=beside_experts, options=_EXPERTS),
    HandWrittenFault("experts_without_copy", "the gradient of what experts are given is not summed",
                     _experts_without_copy, ("blocks.1.mlp", "blocks.1.mlp.experts"), ("missing_reduce",),
                     style=beside_experts, options=_EXPERTS),
    HandWrittenFault("scaled_beside_a_metric_over_dp",
                     "a module that averages a metric over the data-parallel group multiplies its output",
                     _scaled_beside_a_metric, ("norm",), (None,), checks=_FORWARD, topology=TP2_DP2),
)  # fmt: skip

CONTROLS = (
    HandWrittenControl(inside),
    HandWrittenControl(around),
    HandWrittenControl(around, {"beside": True}),
    HandWrittenControl(in_hooks),
    HandWrittenControl(redistributed),
    HandWrittenControl(along_the_sequence),
    HandWrittenControl(compiled),
    HandWrittenControl(compiled_whole),
    HandWrittenControl(inside, also=largest_subtracted),
    HandWrittenControl(inside, _INNER_NORM, also=whole_statistic),
    HandWrittenControl(inside, {"repeats": 2}),
    HandWrittenControl(inside, {"down_bias": True}, also=bias_after_sum),
    HandWrittenControl(inside, _DIRECT),
    HandWrittenControl(beside_experts, _EXPERTS),
    HandWrittenControl(around, topology=TP2_DP2),
    HandWrittenControl(inside_adapters, {"lora": 2}, also=adapters_reduced),
    HandWrittenControl(inside_adapters, {"lora": 2, "dora": True}, also=adapters_reduced),
)
