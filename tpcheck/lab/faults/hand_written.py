"""Mistakes in tensor parallelism that is written by hand, and the styles of right code that must pass.

Shape suffixes: B samples, L tokens, D features, F inner features, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tpcheck.backends.interface import RankLike
from tpcheck.backends.sgd import Clip
from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import TP2, TP2_DP2
from tpcheck.lab.faults.hand_written_model import (
    Function,
    Model,
    Style,
    adapters_reduced,
    along_the_sequence,
    around,
    beside_experts,
    bias_after_sum,
    compiled,
    compiled_whole,
    copied,
    cut_weights,
    in_hooks,
    inside,
    inside_adapters,
    label_logit,
    largest_subtracted,
    redistributed,
    reduced,
    sum_over_ranks,
    unchanged,
    whole_parts_reduced,
)
from tpcheck.lab.faults.injection import with_backward
from tpcheck.numerics.checks import ON_REQUEST


def _first_experts_everywhere(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.experts.first = 0


def _router_behind_copy(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.experts.enter_router = copied(rank.group("tp"))


def _experts_without_copy(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.experts.enter = unchanged


def _residual_in_the_sum(model: Model, rank: RankLike) -> None:
    mlp = model.block(0).mlp
    mlp.forward = lambda hidden_BLD: (
        mlp.leave(hidden_BLD + functional.silu(mlp.up(mlp.enter(hidden_BLD))) @ mlp.down.weight.t()) + mlp.down.bias
    )


def _bias_in_the_sum(model: Model, rank: RankLike) -> None:
    mlp = model.block(0).mlp
    mlp.forward = lambda hidden_BLD: hidden_BLD + mlp.leave(mlp.down(functional.silu(mlp.up(mlp.enter(hidden_BLD)))))


def _dora_norm_of_one_shard(model: Any, rank: RankLike) -> None:
    adapters_reduced(model, rank)
    del model.get_submodule(_DORA_NORM).get_weight_norm


def _loss_scaled(model: Model, rank: RankLike) -> None:
    """Multiply the gradient of the loss by 1.5, as a wrong loss scale does."""
    model.loss.register_forward_hook(lambda module, args, loss: with_backward(loss, lambda gradient: 1.5 * gradient))


def _copy_left_out(model: Model, rank: RankLike) -> None:
    model.block(0).mlp.enter = unchanged


def _reduce_left_out(model: Model, rank: RankLike) -> None:
    model.block(0).mlp.leave = unchanged


def _summed_over_dp(model: Model, rank: RankLike) -> None:
    model.block(1).mlp.leave = reduced(rank.group("dp"))


class _LogSoftmax(torch.autograd.Function):
    """Logarithm of the softmax over the ranks' parts, whose backward returns the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, logits_BLV: Tensor, group: Any) -> Tensor:
        return logits_BLV - sum_over_ranks(logits_BLV.exp().sum(-1, keepdim=True), group).log()

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
    return lambda tensor: sum_over_ranks(tensor.detach(), group)


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


def _unseen_reduction(model: Model, rank: RankLike) -> None:
    """Reduce the output of a row-parallel layer, cut off from its terms."""
    group = rank.group("tp")
    layer = model.block(1).mlp.down

    def forward(hidden_BLF: Tensor) -> Tensor:
        total = functional.linear(hidden_BLF, layer.weight).detach()
        dist.all_reduce(total, group=group)
        return total

    layer.forward = forward
    model.block(1).mlp.leave = unchanged


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
        return sum_over_ranks(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(gradients[0], ctx.group), None


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
                     whole_parts_reduced("*.blocks.0.attention.q.lora_A.*"),
                     (f"{_BLOCKS}.0.attention.q.lora_A.default", f"{_BLOCKS}.0.attention.q.lora_B.default"),
                     ("partial_gradient_on_replica", "missing_reduce"),
                     style=inside_adapters, options={"lora": 2}),
    HandWrittenFault("hand_written_lora_b_unreduced",
                     "each rank keeps its term of the gradient of B, before which A is cut",
                     whole_parts_reduced("*.blocks.1.mlp.down.lora_B.*"),
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
