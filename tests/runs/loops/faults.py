"""Faults of training loops: each class does one thing differently from the loop that it derives from."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from tests.runs.loops.engines import DeepSpeed
from tests.runs.loops.hand_written import (
    CopyToRanks,
    RowParallel,
    SumOverRanks,
    TokenLoss,
    Training,
    VocabularyParallelLoss,
)
from tests.runs.loops.huggingface import TransformersTp
from tests.runs.loops.megatron_models import Megatron
from tests.runs.loops.right_by_hand import ByDdp, SumsBeforeTheStep, WithGradScaler

# ---- steps


class NeverSteps(Training):
    def update(self, step: int) -> None:
        """Leave the weights as they are."""


class OmitsTheLastStep(Training):
    def update(self, step: int) -> None:
        if step < self.steps - 1:
            super().update(step)


class OneRankDoesNotStep(Training):
    def update(self, step: int) -> None:
        if self.run.tp_rank != 1:
            super().update(step)


class ParameterMissingFromTheOptimizer(Training):
    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        named = self.model.named_parameters()
        return [self.make_optimizer([parameter for name, parameter in named if name != "blocks.1.up.weight"])]


# ---- accumulation


class NotDividedByMicroBatches(Training):
    def share(self, step: int) -> float:
        return super().share(step) * self.accumulate


class ForgetsZeroGrad(Training):
    def zero_grad(self) -> None:
        """Keep the gradients."""


class ClearsBeforeEachMicroBatch(Training):
    """Only the last micro-batch counts."""

    def backward(self, loss: torch.Tensor) -> None:
        self.zero_grad()
        super().backward(loss)


class LeavesMicroBatchUnreduced(Training):
    """Hooks sum a norm's gradient over the TP group in the last micro-batch only."""

    sequence = True

    def sum_over_tp(self, gradient: torch.Tensor) -> torch.Tensor:
        return super().sum_over_tp(gradient) if self.micro_batch == self.accumulate - 1 else gradient


class ReducesAfterAccumulation(Training):
    """Hooks sum the accumulated gradient over the TP group after each micro-batch."""

    sequence = True

    def hook_gradient(self, name: str, parameter: torch.Tensor) -> None:
        parameter.register_post_accumulate_grad_hook(self.sum_accumulated)

    def sum_accumulated(self, parameter: torch.Tensor) -> None:
        dist.all_reduce(parameter.grad, group=self.run.rank.group("tp"))


class ReducesReplicasAfterEachMicroBatch(Training):
    """The accumulated gradient is averaged over the replicas at each micro-batch, the first ones' again and again."""

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        if self.run.dp > 1:
            for gradient in self.gradients().values():
                dist.all_reduce(gradient, group=self.run.rank.group("dp"))

    def reduce_gradients(self) -> None:
        for gradient in self.gradients().values():
            gradient /= self.run.dp


class LastBackwardWithoutSync(ByDdp):
    """DDP's no_sync around all micro-batches: nothing is averaged."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.run.dp == 1:
            return super().loss(tokens, labels)
        with self.wrapped.no_sync():
            return Training.loss(self, tokens, labels)


# ---- loss scale


class UnscalesTwice(Training):
    def unscale(self) -> None:
        super().unscale()
        super().unscale()


class NotUnscaledOnOneRank(Training):
    def unscale(self) -> None:
        if self.run.tp_rank != 1:
            super().unscale()


class HalvedByHooks(Training):
    """Hooks halve the gradients of two parameters, a replica and a shard; on one rank they may be missing."""

    missing_on = -1

    def start(self) -> None:
        if self.run.tp_rank == self.missing_on and self.run.tp > 1:
            return
        for name, parameter in self.model.named_parameters():
            if name in ("blocks.1.norm.weight", "blocks.1.up.weight"):
                parameter.register_hook(lambda gradient: gradient / 2)


class HooksDroppedOnOneRank(HalvedByHooks):
    missing_on = 1


class ScalersPart(WithGradScaler):
    """A gradient is infinite on one rank in the second step: it alone skips, and halves its scale."""

    steps = 3

    def unscale(self) -> None:
        if self.step_number == 1 and self.run.tp_rank == 1:
            self.model.blocks[0].up.weight.grad[0, 0] = float("inf")
        super().unscale()

    def train_step(self, step: int) -> None:
        self.step_number = step
        super().train_step(step)


class ClipsBeforeUnscaling(Training):
    def train_step(self, step: int) -> None:
        for number, (tokens, labels) in enumerate(self.micro_batches(step)):
            self.micro_batch = number
            self.backward(self.loss(tokens, labels) * self.share(step))
        self.reduce_gradients()
        self.clip_gradients()
        self.unscale()
        self.update(step)
        self.zero_grad()


# ---- norms


class LocalNorm(Training):
    def gradient_norm(self) -> float:
        sharded, replicated = self.squares()
        return sqrt(sharded + replicated)


class NormCountsReplicas(Training):
    def gradient_norm(self) -> float:
        return sqrt(self.over_tp(sum(self.squares())))


class NormLeavesOutShards(Training):
    """The first rank's shards and the replicas."""

    def gradient_norm(self) -> float:
        sharded, replicated = self.squares()
        return sqrt(self.over_tp(sharded if self.run.tp_rank == 0 else 0.0) + replicated)


class NormAveraged(Training):
    def gradient_norm(self) -> float:
        return self.over_tp(sqrt(sum(self.squares()))) / self.run.tp


class NormSummed(Training):
    def gradient_norm(self) -> float:
        return self.over_tp(sqrt(sum(self.squares())))


# ---- schedulers and optimizers


class OneRankAhead(Training):
    """One rank steps its scheduler twice."""

    is_scheduled = True

    def schedule(self) -> None:
        super().schedule()
        if self.run.tp_rank == 1:
            super().schedule()


class ScheduleOffByOne(Training):
    """The scheduler steps before the optimizer."""

    is_scheduled = True

    def update(self, step: int) -> None:
        self.schedule()
        for optimizer in self.optimizers:
            optimizer.step()


class MomentsOfAnotherRank(Training):
    """Rank 1 resumes with the moments of rank 0: the recording begins after a first step."""

    def recorded_optimizer(self) -> Any:
        self.train_step(50)
        if self.run.tp > 1:
            self.take_moments()
        return super().recorded_optimizer()

    def take_moments(self) -> None:
        for parameter in self.model.parameters():
            for name, value in self.optimizers[0].state[parameter].items():
                if name != "step":
                    moments = value.clone()
                    dist.broadcast(moments, self.source(), group=self.run.rank.group("tp"))
                    value.copy_(moments)

    def source(self) -> int:
        """Return the global rank whose moments are taken."""
        return int(self.run.rank.topology.peers(self.run.rank.rank, "tp")[0])


class OwnMoments(MomentsOfAnotherRank):
    def source(self) -> int:
        raise NotImplementedError

    def recorded_optimizer(self) -> Any:
        self.train_step(50)
        return Training.recorded_optimizer(self)


class MomentsLost(OwnMoments):
    """A resume that forgets the moments."""

    def recorded_optimizer(self) -> Any:
        recorded = super().recorded_optimizer()
        self.optimizers[0].state.clear()
        return recorded


class MomentsTakenInTheMiddle(MomentsOfAnotherRank):
    """Rank 1 takes the moments of rank 0 after the second step."""

    def recorded_optimizer(self) -> Any:
        return Training.recorded_optimizer(self)

    def after_step(self, step: int) -> None:
        if step == 1 and self.run.tp > 1:
            self.take_moments()


class MomentsTakenBeforeTheStep(MomentsTakenInTheMiddle):
    """Rank 1 takes the moments of rank 0 between a backward pass and the step that follows."""

    def after_step(self, step: int) -> None:
        pass

    def update(self, step: int) -> None:
        if step == 1 and self.run.tp > 1:
            self.take_moments()
        super().update(step)


class MomentsZeroedInTheMiddle(Training):
    """Moments are set to zero between a backward pass and the step that follows."""

    def update(self, step: int) -> None:
        if step == 1:
            for state in self.optimizers[0].state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
        super().update(step)


class StepCountOff(OwnMoments):
    """A resume that counts one step too many, which the bias correction sees."""

    def recorded_optimizer(self) -> Any:
        recorded = super().recorded_optimizer()
        for state in self.optimizers[0].state.values():
            state["step"] += 1
        return recorded


class Muon(Training):
    """Muon for the blocks' matrices, SGD for the rest: on shards its orthogonalisation sees one shard."""

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        named = dict(self.model.named_parameters())
        matrices = [name for name in named if ".up.weight" in name or ".down.weight" in name]
        others = [parameter for name, parameter in named.items() if name not in matrices]
        muon = torch.optim.Muon([named[name] for name in matrices], lr=0.02)
        return [muon, torch.optim.SGD(others, lr=0.1)]


class Adafactor(Training):
    """Adafactor on shards: its factored second moments are means over one shard's rows and columns."""

    optimizer = "Adafactor"
    optimizer_options = (("lr", 0.01),)


# ---- collectives


class UnreducedRow(RowParallel):
    def reduce(self, product_BLD: torch.Tensor) -> torch.Tensor:
        return product_BLD


class TwiceReducedRow(RowParallel):
    def reduce(self, product_BLD: torch.Tensor) -> torch.Tensor:
        return SumOverRanks.apply(super().reduce(product_BLD), self.group)  # type: ignore[no-any-return]


class AveragedRow(RowParallel):
    def reduce(self, product_BLD: torch.Tensor) -> torch.Tensor:
        return super().reduce(product_BLD) / dist.get_world_size(self.group)


class BiasOnEachRank(RowParallel):
    def forward(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        return self.reduce(functional.linear(hidden_BLH, self.weight, self.bias))


class WorldReducedRow(RowParallel):
    """Sums over all ranks of the world."""

    def reduce(self, product_BLD: torch.Tensor) -> torch.Tensor:
        return SumOverRanks.apply(product_BLD, dist.group.WORLD)  # type: ignore[no-any-return]


class SecondRow(Training):
    """The row-parallel layer of the second block is another one."""

    layer = RowParallel

    def shard(self, model: Any) -> None:
        down = model.blocks[1].down
        super().shard(model)
        model.blocks[1].down = self.layer(down, self.run, sequence=self.sequence)


class UnreducedSecondRow(SecondRow):
    layer = UnreducedRow


class TwiceReducedSecondRow(SecondRow):
    layer = TwiceReducedRow


class AveragedSecondRow(SecondRow):
    layer = AveragedRow


class BiasOnEachRankOfSecondRow(SecondRow):
    layer = BiasOnEachRank


class WorldReducedSecondRow(SecondRow):
    layer = WorldReducedRow


class ColumnWithoutBackwardSum(Training):
    """The input gradients of a column-parallel layer are not summed."""

    def shard(self, model: Any) -> None:
        super().shard(model)
        up = model.blocks[1].up
        up.forward = lambda hidden_BLD: functional.linear(hidden_BLD, up.weight, up.bias)


class LossWithoutBackward(VocabularyParallelLoss):
    def sum_exponentials(self, exponentials_BL: torch.Tensor) -> torch.Tensor:
        total_BL = exponentials_BL.detach().clone()
        dist.all_reduce(total_BL, group=self.group)
        return total_BL


class LossOverMean(VocabularyParallelLoss):
    def sum_targets(self, target_BL: torch.Tensor) -> torch.Tensor:
        return super().sum_targets(target_BL) / dist.get_world_size(self.group)


class LossOverWorld(VocabularyParallelLoss):
    def sum_exponentials(self, exponentials_BL: torch.Tensor) -> torch.Tensor:
        return SumOverRanks.apply(exponentials_BL, dist.group.WORLD)  # type: ignore[no-any-return]


class LossGradientSummed(VocabularyParallelLoss):
    """torch's differentiable all_reduce sums the gradients of all ranks, which have the same loss."""

    def sum_targets(self, target_BL: torch.Tensor) -> torch.Tensor:
        return CopyToRanks.apply(super().sum_targets(target_BL), self.group)  # type: ignore[no-any-return]


class VocabularyTraining(Training):
    vocabulary_parallel = True
    loss_type = VocabularyParallelLoss

    def vocabulary_loss(self) -> TokenLoss:
        return self.loss_type(self.run)


class TrainsLossWithoutBackward(VocabularyTraining):
    loss_type = LossWithoutBackward


class TrainsLossOverMean(VocabularyTraining):
    loss_type = LossOverMean


class TrainsLossOverWorld(VocabularyTraining):
    loss_type = LossOverWorld


class TrainsLossGradientSummed(VocabularyTraining):
    loss_type = LossGradientSummed


class MeanOfLocalMeans(Training):
    """Each replica divides by its own number of labels."""

    masked = True


# ---- replicas


class NormDrifts(Training):
    """One rank's norm weight is another after the first step."""

    def after_step(self, step: int) -> None:
        if step == 0 and self.run.tp_rank == 1:
            with torch.no_grad():
                self.model.blocks[1].norm.weight[3] += 1e-3


class HookMissing(Training):
    """One norm's gradients are not summed over the TP group."""

    sequence = True

    def hook_gradient(self, name: str, parameter: torch.Tensor) -> None:
        if name != "blocks.1.norm.weight":
            super().hook_gradient(name, parameter)


class SumsNothing(SumsBeforeTheStep):
    """Sequence parallelism whose gradients are never summed."""

    def reduce_gradients(self) -> None:
        """Leave them as they are."""


class NotBroadcast(Training):
    """One rank begins with a norm weight of its own."""

    def start(self) -> None:
        if self.run.tp_rank == 1:
            with torch.no_grad():
                self.model.norm.weight.copy_(torch.rand(self.model.norm.weight.shape, dtype=self.dtype))


class ReplicasSummed(Training):
    """Gradients of replicas are summed and not averaged."""

    def reduce_gradients(self) -> None:
        super().reduce_gradients()
        for gradient in self.gradients().values():
            gradient *= self.run.dp


class ReplicasUnreduced(Training):
    """Each replica trains on its own gradients."""

    def reduce_gradients(self) -> None:
        """Leave them as they are."""


class OneParameterUnreduced(Training):
    """One parameter's gradient is not averaged over the replicas."""

    def gradients(self) -> dict[str, torch.Tensor]:
        gradients = super().gradients()
        if self.is_reducing:
            del gradients["blocks.1.down.weight"]
        return gradients

    is_reducing = False

    def reduce_gradients(self) -> None:
        self.is_reducing = True
        super().reduce_gradients()
        self.is_reducing = False


# ---- libraries


class MegatronWithoutOneNorm(Megatron):
    """`finalize_model_grads` passes over one norm, which has lost its mark."""

    sequence = True

    def start(self) -> None:
        if self.run.tp > 1:
            self.model.decoder.layers[0].input_layernorm.weight.sequence_parallel = False


class StepAfterAllBackwards(DeepSpeed):
    """All backward passes, then one step, while the engine is configured for one micro-batch a step."""

    configured = 1

    def train_step(self, step: int) -> None:
        for tokens, labels in self.micro_batches(step):
            self.engine.backward(self.loss(tokens, labels) / self.accumulate)
        self.engine.step()


class StaleMasters(DeepSpeed):
    """Weights are loaded into an engine that has float32 masters already: the first step brings the old ones back."""

    is_late = True

    def build(self) -> nn.Module:
        model: Any = super().build()
        if not self.is_late:
            scale_weights(model)
        return model  # type: ignore[no-any-return]

    def after_initialize(self) -> None:
        super().after_initialize()
        if self.is_late:
            scale_weights(self.engine.module)


def scale_weights(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(1.25)


class FreshMasters(StaleMasters):
    is_late = False


class OneProjectionOff(TransformersTp):
    """The output projection of one layer is 8 % too large in the forward pass."""

    layers = 12
    dtype = torch.bfloat16
    steps = 1
    off = True

    def start(self) -> None:
        if self.off:
            projection = self.model.model.layers[9].self_attn.o_proj
            projection.register_forward_hook(lambda module, args, output: output * 1.08)


class NoProjectionOff(OneProjectionOff):
    off = False


class NondeterministicModule(Training):
    """A module adds noise of its own."""

    is_noisy = True

    def start(self) -> None:
        if self.is_noisy:
            noise = torch.Generator()
            noise.seed()
            layer = self.model.blocks[1].up
            layer.register_forward_hook(
                lambda module, args, output: output + 1e-6 * torch.randn(output.shape, generator=noise)
            )


class Deterministic(NondeterministicModule):
    is_noisy = False
