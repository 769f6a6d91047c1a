"""A model of column- and row-parallel layers written by hand, and its training loop, one method for each of its steps.

A loop of the tables is this one with options, or a subclass that does one thing differently.

B: batch, L: length, D: width, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.runs.loops.loop import Run, Weights

VOCABULARY, WIDTH, HIDDEN, LENGTH, SAMPLES = 32, 16, 32, 8, 8
IGNORED = -100


# ---- collectives with a backward pass


class CopyToRanks(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class SumOverRanks(torch.autograd.Function):
    """The sum over the ranks, whose gradient goes to each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        summed = tensor.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class GatherSequence(torch.autograd.Function):
    """Gather positions before a column-parallel layer; the gradient is summed and cut."""

    @staticmethod
    def forward(ctx: Any, tensor_BLD: torch.Tensor, group: Any, is_summed: bool) -> torch.Tensor:
        ctx.group, ctx.is_summed = group, is_summed
        return torch.cat(_all_gather(tensor_BLD, group), 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.contiguous().clone()
        if ctx.is_summed:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group), 1)[dist.get_rank(ctx.group)].clone(), None, None


class CutSequence(torch.autograd.Function):
    """Take this rank's positions, of the sum over the ranks where asked; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, tensor_BLD: torch.Tensor, group: Any, is_summed: bool) -> torch.Tensor:
        ctx.group = group
        tensor_BLD = tensor_BLD.contiguous().clone()
        if is_summed:
            dist.all_reduce(tensor_BLD, group=group)
        return tensor_BLD.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.cat(_all_gather(gradient, ctx.group), 1), None, None


def _all_gather(tensor: torch.Tensor, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


# ---- layers


class ColumnParallel(nn.Module):
    """Output columns of a linear layer."""

    def __init__(self, linear: nn.Linear, run: Run, *, sequence: bool) -> None:
        super().__init__()
        self.group, self.sequence = run.rank.group("tp"), sequence
        self.weight = nn.Parameter(linear.weight.detach().chunk(run.tp, 0)[run.tp_rank].clone())
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().chunk(run.tp, 0)[run.tp_rank].clone())

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        if self.sequence:
            hidden_BLD = GatherSequence.apply(hidden_BLD, self.group, True)
        else:
            hidden_BLD = CopyToRanks.apply(hidden_BLD, self.group)
        return functional.linear(hidden_BLD, self.weight, self.bias)


class RowParallel(nn.Module):
    """Input columns of a linear layer; the ranks' products are summed, then the bias is added."""

    def __init__(self, linear: nn.Linear, run: Run, *, sequence: bool) -> None:
        super().__init__()
        self.group, self.sequence = run.rank.group("tp"), sequence
        self.weight = nn.Parameter(linear.weight.detach().chunk(run.tp, 1)[run.tp_rank].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        return self.reduce(functional.linear(hidden_BLH, self.weight)) + self.bias

    def reduce(self, product_BLD: torch.Tensor) -> torch.Tensor:
        if self.sequence:
            return CutSequence.apply(product_BLD, self.group, True)
        return SumOverRanks.apply(product_BLD, self.group)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up: nn.Module = nn.Linear(WIDTH, HIDDEN)
        self.down: nn.Module = nn.Linear(HIDDEN, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return hidden_BLD + self.dropout(self.down(functional.gelu(self.up(self.norm(hidden_BLD)))))


class TokenModel(nn.Module):
    """Embedding, blocks, norm, head and loss; with labels it returns the loss.

    Attributes:
        passes: How often the blocks run: shared submodules where more than once.
        checkpointing: `reentrant`, `non_reentrant` or nothing.
    """

    def __init__(self, blocks: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks: Any = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head: nn.Module = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.passes, self.checkpointing = 1, ""
        self.sequence_group: Any = None
        self.loss = TokenLoss()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden_BLD = self.embedding(input_ids)
        if self.sequence_group is not None:
            hidden_BLD = CutSequence.apply(hidden_BLD, self.sequence_group, False)
        for block in [*self._blocks()] * self.passes:
            if self.checkpointing:
                hidden_BLD = checkpoint(block, hidden_BLD, use_reentrant=self.checkpointing == "reentrant")
            else:
                hidden_BLD = block(hidden_BLD)
        hidden_BLD = self.norm(hidden_BLD)
        if self.sequence_group is not None:
            hidden_BLD = GatherSequence.apply(hidden_BLD, self.sequence_group, False)
        logits_BLV = self.head(hidden_BLD)
        return logits_BLV if labels is None else self.loss(logits_BLV, labels)

    def _blocks(self) -> Iterator[nn.Module]:
        yield from self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks


class TokenLoss(nn.Module):
    """Cross entropy over the labels that are not ignored.

    Attributes:
        reduction: `mean` or `sum`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(
            logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED, reduction=self.reduction
        )


class VocabularyParallelLoss(TokenLoss):
    """Cross entropy of logits whose vocabulary is cut over the TP group."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.group, self.first = run.rank.group("tp"), run.tp_rank * VOCABULARY // run.tp

    def forward(self, logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        largest_BL = logits_BLV.detach().amax(-1)
        dist.all_reduce(largest_BL, op=dist.ReduceOp.MAX, group=self.group)
        shifted_BLV = logits_BLV - largest_BL.unsqueeze(-1)
        local_BL = labels_BL - self.first
        is_here_BL = (local_BL >= 0) & (local_BL < logits_BLV.shape[-1])
        picked_BL = shifted_BLV.gather(-1, local_BL.clamp(0, logits_BLV.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        target_BL = self.sum_targets(torch.where(is_here_BL, picked_BL, 0.0))
        total_BL = self.sum_exponentials(shifted_BLV.exp().sum(-1))
        loss = torch.where(labels_BL == IGNORED, 0.0, total_BL.log() - target_BL).sum()
        return loss / (labels_BL != IGNORED).sum() if self.reduction == "mean" else loss

    def sum_targets(self, target_BL: torch.Tensor) -> torch.Tensor:
        return SumOverRanks.apply(target_BL, self.group)

    def sum_exponentials(self, exponentials_BL: torch.Tensor) -> torch.Tensor:
        return SumOverRanks.apply(exponentials_BL, self.group)


def build_model(dtype: torch.dtype, *, blocks: int = 2, dropout: float = 0.0, seed: int = 0) -> TokenModel:
    """Return the unsharded model, with biases and norm weights away from 0 and 1."""
    torch.manual_seed(seed)
    model = TokenModel(blocks, dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


# ---- the loop


class Training:
    """Tensor parallelism over the TP group, data parallelism by an all-reduce of the gradients; at one rank neither."""

    dtype = torch.float64
    blocks = 2
    steps = 2
    accumulate = 1
    optimizer = "SGD"
    optimizer_options: tuple[tuple[str, Any], ...] = (("lr", 0.1),)
    clip: float | None = None
    loss_scale = 1.0
    is_scheduled = False
    sequence = False
    vocabulary_parallel = False
    masked = False
    reduction = "mean"
    dropout = 0.0
    passes = 1
    checkpointing = ""
    compiled = False
    reverse_samples = False
    seed = 0
    model_seed = 0

    def __init__(self, run: Run, **options: Any) -> None:
        self.run = run
        for name, value in options.items():
            if not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__} has no option {name}")
            setattr(self, name, value)
        self.micro_batch = 0

    def train(self) -> Weights:
        self.model: Any = self.build()
        self.start()
        self.wrapped: Any = self.wrap(self.model)
        self.optimizers = self.make_optimizers()
        self.schedulers = [self.make_scheduler(optimizer) for optimizer in self.optimizers if self.is_scheduled]
        torch.manual_seed(7)
        with self.run.record(self.wrapped, self.recorded_optimizer()):
            for step in range(self.steps):
                self.train_step(step)
        return self.weights()

    # -- before the loop

    def build(self) -> nn.Module:
        model = build_model(self.dtype, blocks=self.blocks, dropout=self.dropout, seed=self.model_seed)
        model.passes, model.checkpointing = self.passes, self.checkpointing
        if self.run.tp > 1:
            self.shard(model)
        model.loss.reduction = self.reduction
        if self.compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager")
        return model

    def shard(self, model: TokenModel) -> None:
        for block in model._blocks():
            block.up = ColumnParallel(block.up, self.run, sequence=self.sequence)  # type: ignore[arg-type]
            block.down = self.row_parallel(block.down)
        if self.vocabulary_parallel:
            model.head = ColumnParallel(model.head, self.run, sequence=False)  # type: ignore[arg-type]
            model.loss = self.vocabulary_loss()
        if self.sequence:
            model.sequence_group = self.run.rank.group("tp")
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("down.bias"):
                    self.hook_gradient(name, parameter)

    def row_parallel(self, linear: Any) -> nn.Module:
        return RowParallel(linear, self.run, sequence=self.sequence)

    def vocabulary_loss(self) -> TokenLoss:
        return VocabularyParallelLoss(self.run)

    def hook_gradient(self, name: str, parameter: torch.Tensor) -> None:
        """Sum each gradient of a parameter that every rank uses for its own positions."""
        parameter.register_hook(self.sum_over_tp)

    def sum_over_tp(self, gradient: torch.Tensor) -> torch.Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=self.run.rank.group("tp"))
        return summed

    def start(self) -> None:
        """Do something to the model before it is trained."""

    def wrap(self, model: nn.Module) -> Any:
        return model

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [self.make_optimizer(trained)]

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(parameters, **dict(self.optimizer_options))  # type: ignore[no-any-return]

    def make_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def recorded_optimizer(self) -> Any:
        return self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers

    # -- the data

    def tokens(self, step: int) -> torch.Tensor:
        """Return the whole batch of a step."""
        generator = torch.Generator().manual_seed(100 * self.seed + step)
        tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
        return tokens.flip(0) if self.reverse_samples else tokens

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return labels, of which the later samples ignore more where they are masked."""
        labels = (tokens * 3 + 1) % VOCABULARY
        if self.masked:
            for sample in range(len(labels)):
                labels[sample, : sample * LENGTH // len(labels)] = IGNORED
        return labels

    def micro_batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return this replica's micro-batches, of tokens and labels."""
        tokens = self.tokens(step)
        labels = self.labels(tokens)
        count = self.run.dp * self.accumulate
        return list(zip(tokens.chunk(count), labels.chunk(count), strict=True))[self.run.dp_rank :: self.run.dp]

    def share(self, step: int) -> float:
        """Return by what a micro-batch's loss is multiplied, for the replicas' mean to be the mean over all labels."""
        if self.reduction == "mean":
            return 1 / self.accumulate
        return self.run.dp / float((self.labels(self.tokens(step)) != IGNORED).sum())

    # -- one step

    def train_step(self, step: int) -> None:
        for number, (tokens, labels) in enumerate(self.micro_batches(step)):
            self.micro_batch = number
            self.backward(self.loss(tokens, labels) * self.share(step))
        self.reduce_gradients()
        self.unscale()
        self.clip_gradients()
        self.update(step)
        self.zero_grad()
        self.after_step(step)

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.precision():
            return self.wrapped(tokens, labels)  # type: ignore[no-any-return]

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.loss_scale).backward()

    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: parameter.grad for name, parameter in self.parameters().items() if parameter.grad is not None}

    def reduce_gradients(self) -> None:
        if self.run.dp > 1:
            for gradient in self.gradients().values():
                dist.all_reduce(gradient, group=self.run.rank.group("dp"))
                gradient /= self.run.dp

    def unscale(self) -> None:
        for gradient in self.gradients().values():
            gradient /= self.loss_scale

    def is_sharded(self, name: str) -> bool:
        if self.run.tp == 1:
            return False
        return ".up." in name or name.endswith("down.weight") or (self.vocabulary_parallel and name == "head.weight")

    def squares(self) -> tuple[float, float]:
        """Return the sums of squares of the sharded gradients on this rank, and of the replicated ones."""
        sums = [0.0, 0.0]
        for name, gradient in self.gradients().items():
            sums[not self.is_sharded(name)] += float(gradient.double().square().sum())
        return sums[0], sums[1]

    def over_tp(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.run.rank.group("tp"))
        return float(total)

    def gradient_norm(self) -> float:
        sharded, replicated = self.squares()
        return sqrt(self.over_tp(sharded) + replicated)

    def clip_gradients(self) -> None:
        if self.clip is not None:
            factor = min(1.0, self.clip / self.gradient_norm())
            for gradient in self.gradients().values():
                gradient *= factor

    def update(self, step: int) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.schedule()

    def schedule(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def after_step(self, step: int) -> None:
        """Do what a loop does between steps."""

    def weights(self) -> Weights:
        return {name: parameter.detach().clone() for name, parameter in self.parameters().items()}
