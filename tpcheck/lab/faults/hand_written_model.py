"""A model whose tensor parallelism is written by hand, in the styles that people use.

Shape suffixes: B samples, L tokens, D features, F inner features, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from tpcheck.core.placement import Placement, Shard

VOCABULARY, WIDTH, INNER, HEADS, LAYERS, LENGTH, EXPERTS = 32, 16, 32, 4, 2, 8, 4

Function = Callable[[Tensor], Tensor]


def unchanged(tensor: Tensor) -> Tensor:
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
        self.enter: Function = unchanged
        self.leave: Function = unchanged

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
        self.enter: Function = unchanged
        self.enter_router: Function = unchanged
        self.enter_weights: Function = unchanged
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
        self.start: Function = unchanged
        self.enter: Function = unchanged

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


def inside_adapters(model: Any, rank: RankLike) -> None:
    """Call f and g in the model inside one of peft, and sum the squares of the norms of DoRA's row-parallel layers."""
    inside(model.get_base_model(), rank)
    for name, module in model.named_modules():
        if any(fnmatchcase(name, f"*.{row}.lora_magnitude_vector.default") for row in ROW):
            module.get_weight_norm = partial(_norm_of_rows, rank.group("tp"))


def _norm_of_rows(group: Any, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str) -> Tensor:
    """Return DoRA's norm of each row of a weight of which every rank has some columns."""
    return sum_over_ranks((weight + scaling * lora_weight).detach().square().sum(1), group).sqrt()


def whole_parts_reduced(*left_out: str) -> Style:
    """Return what sums the gradients of the parts of adapters that every rank holds, but of those left out."""

    def reduce(model: nn.Module, rank: RankLike) -> None:
        group = rank.group("tp")
        for name, parameter in model.named_parameters():
            is_whole = any(fnmatchcase(name, pattern) for pattern in WHOLE_PARTS)
            if is_whole and not any(fnmatchcase(name, pattern) for pattern in left_out):
                parameter.register_hook(lambda gradient: sum_over_ranks(gradient, group))  # type: ignore[no-untyped-call]

    return reduce


adapters_reduced = whole_parts_reduced()
adapters_reduced.__name__ = "adapters_reduced"


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
            parameter.register_hook(lambda gradient: sum_over_ranks(gradient, group))  # type: ignore[no-untyped-call]
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


def sum_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


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


def compiled(model: Model, rank: RankLike) -> None:
    """Compile each MLP; `backend="eager"` needs no C++ compiler."""
    inside(model, rank)
    for block in model.all_blocks():
        block.mlp.compile(backend="eager")


def compiled_whole(model: Model, rank: RankLike) -> None:
    """Compile the model; collectives inside autograd functions break its graph into parts."""
    inside(model, rank)
    model.compile(backend="eager")
