"""Right training loops of the model written by hand: everything that a loop may do between two optimizer steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.runs.loops.hand_written import Training


class SeveralOptimizers(Training):
    """AdamW for matrices and SGD for the rest, each with its own schedule."""

    is_scheduled = True

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        return [torch.optim.AdamW(matrices, lr=1e-2), torch.optim.SGD(others, lr=0.1, momentum=0.9, nesterov=True)]


class ParameterGroups(Training):
    """AdamW without weight decay for norms and biases."""

    norm_decay = 0.0

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": self.norm_decay}]
        return [torch.optim.AdamW(groups, lr=1e-2)]


class WithGradScaler(Training):
    """torch's GradScaler, whose scale grows after each step."""

    def start(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self) -> None:
        self.scaler.unscale_(self.optimizers[0])

    def update(self, step: int) -> None:
        self.scaler.step(self.optimizers[0])
        self.scaler.update()
        self.schedule()


class WithGradScalerAndOverflow(WithGradScaler):
    """A GradScaler that skips the second of three steps on all ranks: its loss is infinite."""

    steps = 3

    def train_step(self, step: int) -> None:
        self.is_infinite = step == 1
        super().train_step(step)

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss * float("inf") if self.is_infinite else loss)


class Autocast(Training):
    dtype = torch.float32

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)


class AutocastFloat16(WithGradScaler):
    dtype = torch.float32

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.float16)


class Evaluated(Training):
    """Evaluation between micro-batches and after steps, and generation of tokens one by one."""

    steps = 3

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        self.evaluate()

    def after_step(self, step: int) -> None:
        if step == 0:
            self.evaluate()

    def evaluate(self) -> None:
        self.model.eval()
        tokens = self.tokens(99)
        with torch.no_grad():
            self.model(tokens, self.labels(tokens))
            for _ in range(3):
                tokens = torch.cat([tokens, self.model(tokens)[:, -1:].argmax(-1)], 1)
        self.model.train()


class SkipsSteps(Training):
    """Leaves out the optimizer's step of every second batch, on all ranks."""

    steps = 4

    def update(self, step: int) -> None:
        if step % 2 == 0:
            super().update(step)


class FrozenAndUnused(Training):
    """A frozen block and head, and a layer that is never called."""

    def start(self) -> None:
        block = self.model.blocks[0]
        for parameter in [*block.parameters(), *self.model.head.parameters()]:
            parameter.requires_grad_(False)
        self.model.unused = nn.Linear(4, 4, dtype=self.dtype)
        torch.nn.init.ones_(self.model.unused.weight)
        torch.nn.init.ones_(self.model.unused.bias)


class Pairs(Training):
    """Preference pairs: chosen and rejected samples in two calls of the model, with one loss."""

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chosen = self.wrapped(tokens, labels)
        rejected = self.wrapped(tokens, (labels + 5) % labels.max())
        return -functional.logsigmoid(rejected - chosen)


class ByDdp(Training):
    """torch's DistributedDataParallel over the DP group; it averages with the last micro-batch."""

    def wrap(self, model: nn.Module) -> Any:
        if self.run.dp == 1:
            return model
        return DistributedDataParallel(model, process_group=self.run.rank.group("dp"))

    def backward(self, loss: torch.Tensor) -> None:
        if self.run.dp == 1 or self.micro_batch == self.accumulate - 1:
            loss.backward()
        else:
            with self.wrapped.no_sync():
                loss.backward()

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.run.dp == 1 or self.micro_batch == self.accumulate - 1:
            return super().loss(tokens, labels)
        with self.wrapped.no_sync():  # read in the forward pass
            return super().loss(tokens, labels)

    def reduce_gradients(self) -> None:
        """DDP has."""


class InModuleDict(Training):
    """Column-parallel layers in a ModuleDict, where no module around them shows the sum of their input gradients."""

    def build(self) -> nn.Module:
        model: Any = super().build()
        model.blocks = nn.ModuleDict({f"block{number}": block for number, block in enumerate(model.blocks)})
        return model  # type: ignore[no-any-return]


class HooksAfterAccumulation(Training):
    """Sequence parallelism whose gradients are summed once, in hooks that run after accumulation; one micro-batch."""

    sequence = True

    def hook_gradient(self, name: str, parameter: torch.Tensor) -> None:
        parameter.register_post_accumulate_grad_hook(self.sum_accumulated)

    def sum_accumulated(self, parameter: torch.Tensor) -> None:
        dist.all_reduce(parameter.grad, group=self.run.rank.group("tp"))


class SumsBeforeTheStep(Training):
    """Sequence parallelism whose gradients are summed by the loop, after all micro-batches, as Megatron does."""

    sequence = True

    def hook_gradient(self, name: str, parameter: torch.Tensor) -> None:
        """Leave it to the loop."""

    def reduce_gradients(self) -> None:
        if self.run.tp > 1:
            for name, gradient in self.gradients().items():
                if "norm" in name or name.endswith("down.bias"):
                    dist.all_reduce(gradient, group=self.run.rank.group("tp"))
        super().reduce_gradients()


class OtherOrderOfSamples(Training):
    reverse_samples = True


class FirstStepsUnrecorded(Training):
    """The recording begins in the middle of a training, with moments in the optimizer."""

    def start(self) -> None:
        self.is_warm = False

    def recorded_optimizer(self) -> Any:
        if not self.is_warm:
            self.is_warm = True
            self.train_step(50)
            self.train_step(51)
        return super().recorded_optimizer()


class StepsInBackward(Training):
    """An optimizer for each parameter, which steps as soon as its gradient is there."""

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        made = {each: self.make_optimizer([each]) for each in self.model.parameters()}
        for each, optimizer in made.items():
            each.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: step_and_clear(optimizer))
        return [*made.values()]

    def update(self, step: int) -> None:
        """The hooks have."""


def step_and_clear(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


class KeepsPenalty(nn.Module):
    """Returns what it is given; counts its calls, and keeps a loss of each until the loop takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.penalties: list[torch.Tensor] = []

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.penalties.append(hidden_BLD.square().mean() * self.calls)
        return hidden_BLD


class LossesInAttributes(Training):
    """Adds to its loss what modules keep in attributes, as auxiliary losses of routers are kept."""

    def start(self) -> None:
        for block in self.model.blocks:
            block.dropout = KeepsPenalty()

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = super().loss(tokens, labels)
        for block in self.model.blocks:
            loss = loss + 0.1 * sum(block.dropout.penalties)
            block.dropout.penalties.clear()
        return loss


class SequentialModel(Training):
    """An nn.Sequential without ranks, trained with two backward passes a step."""

    accumulate = 2

    def build(self) -> nn.Module:
        torch.manual_seed(self.model_seed)
        return nn.Sequential(
            nn.Embedding(32, 16), nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32)
        ).to(self.dtype)

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.wrapped(tokens).flatten(0, 1), labels.flatten())
