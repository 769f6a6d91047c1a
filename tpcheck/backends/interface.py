"""What a backend implements: sharding a model, training it, and the optional parts that other commands use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from tpcheck.backends.layout import Layout
from tpcheck.backends.loss_scale import LossScale
from tpcheck.core.clipping import TORCH_EPSILON, Clipping
from tpcheck.core.topology import Topology


class RankLike(Protocol):
    """The rank that a backend runs on, as far as a backend may use it."""

    @property
    def rank(self) -> int: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def device(self) -> torch.device: ...

    def group(self, axis: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How both sides train: by default SGD with momentum and weight decay, whose step shows a wrong gradient scale.

    Attributes:
        dtype: Dtype of the model's weights and arithmetic.
        zero_stage: ZeRO stage of the backend, 0 to 3.
        learning_rate, momentum, weight_decay: Of `torch.optim.SGD`.
        max_grad_norm: Gradients are clipped to this norm; 0 switches clipping off.
        clip_epsilon, clip_scales_up: The convention by which the reference clips: see `clipping`. The candidate's own
            is read off its first steps.
        batch_size: Samples that each DP rank sees in a step.
        config: The user's configuration of the backend, merged over tpcheck's.
        ignore_plan: Drop the model's tp_plan, so that the backend's heuristics shard it.
        optimizer: A name in torch.optim, a dict with `type` and `params`, or a callable (parameters) -> Optimizer.
        schedule: Makes the scheduler of the learning rate, whose `step` follows the optimizer's; None for none.
        loss_scale: Makes the scale of losses, as both sides start with it; None where losses are not scaled.
        steps: Optimizer steps of the whole training.
        accumulate: Micro-batches whose gradients a step accumulates.
        loss: `mean` or `token_mean`: how the losses of a step become one.
        attention: Attention of the candidate; None for the model's own.
        experts: How the candidate computes its experts; None for the model's own.
        checkpointing, reentrant: Recompute the candidate's activations in the backward pass, re-entering autograd.
        compile, compile_layers: Compile the candidate whole, or each of its layers.
        loop: `plain`, or `trainer` for transformers' Trainer, which loads its batches itself.
        batches: batches[step][dp_rank][micro_batch], for a loop that loads them itself; empty for others.
        checkpoints: A folder that all ranks share, in which such a loop saves its training; None where it does not.
        save_after: Steps after which it saves; 0 for never.
        resume: The way in which it goes on from what it finds in that folder; empty where it starts anew.
        masters: Whether weights of low precision are stepped in float32.
        decayed_parameters: Returns the names of a model's parameters that `weight_decay` applies to; None for all.
        notes: What of the user's configuration takes no part, in sentences: set by `Backend.resolved`.
        rebuild: Builds the same model a second time, for backends whose models are sharded while they are built.
    """

    dtype: torch.dtype
    zero_stage: int = 0
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    batch_size: int = 2
    config: Mapping[str, Any] = field(default_factory=dict)
    ignore_plan: bool = False
    optimizer: str | Mapping[str, Any] | Callable[..., torch.optim.Optimizer] = "sgd"
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    loss_scale: Callable[[], LossScale] | None = None
    accumulate: int = 1
    steps: int = 1
    loss: str = "mean"
    attention: str | None = None
    experts: str | None = None
    checkpointing: bool = False
    reentrant: bool = False
    compile: bool = False
    compile_layers: bool = False
    loop: str = "plain"
    batches: Sequence[Sequence[Sequence[Mapping[str, Any]]]] = ()
    checkpoints: str | None = None
    save_after: int = 0
    resume: str = ""
    masters: bool = True
    decayed_parameters: Callable[[nn.Module], Collection[str]] | None = None
    rebuild: Callable[[], nn.Module] | None = None
    notes: tuple[str, ...] = ()
    clip_epsilon: float = TORCH_EPSILON
    clip_scales_up: bool = False

    @property
    def clipping(self) -> Clipping:
        """How the reference clips."""
        return Clipping(self.max_grad_norm, self.clip_epsilon, self.clip_scales_up)


class Candidate(Protocol):
    """A sharded model that trains. Parameters and modules keep the names that they had before sharding."""

    @property
    def module(self) -> nn.Module:
        """The sharded model, whose submodules have the names of the unsharded model's."""

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """Return the live groups that this rank uses on each axis, as global ranks, each distinct group once."""

    def layouts(self) -> Mapping[str, Layout]:
        """Return which elements of each parameter every TP rank holds. Collective over the TP group.

        A parameter whose layout cannot be determined is left out, and is not compared.
        """

    def parameter(self, name: str) -> torch.Tensor:
        """Return a copy of this rank's TP shard, gathered over DP. Collective over the DP group."""

    def gradient(self, name: str) -> torch.Tensor | None:
        """Return a copy of the gradient of this rank's TP shard, averaged over DP and over the micro-batches.

        Collective over the DP group.
        """

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model on this rank's batch and return its output."""

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of a micro-batch; `gradient` is valid from the last one of a step to `step`."""

    def step(self) -> None:
        """Clip the gradients and step the optimizer."""

    def gradient_norm(self) -> float | None:
        """Return the norm that the last step clipped by, or None where the backend does not report it."""


class StepObserver(Protocol):
    """What a loop of a library's own tells of its training, in the order of events."""

    def forward(self, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return the context of the forward pass of the next micro-batch."""

    def backward(self) -> AbstractContextManager[None]:
        """Return the context of its backward pass."""

    def add_loss(self, loss: torch.Tensor) -> None:
        """Take what a micro-batch adds to the loss of its step."""

    def gradients_are_ready(self) -> None:
        """Take note that `Candidate.gradient` is valid: after the last backward pass of a step, before clipping."""

    def optimizing(self) -> AbstractContextManager[None]:
        """Return the context of the optimizer's step."""

    def stepped(self) -> None:
        """Take note that a step has ended: optimizer, schedule and counts have stepped, and nothing is saved yet."""

    def logged(self, values: Mapping[str, float]) -> None:
        """Take what is logged of the last step, by the library's names."""


@runtime_checkable
class TrainsByItself(Protocol):
    """A candidate whose loop is a library's, which takes all steps: `forward`, `backward` and `step` are not called."""

    def train(self, observer: StepObserver) -> None:
        """Train on the batches of the options; tell `observer` of every step."""


@runtime_checkable
class ResumesByItself(TrainsByItself, Protocol):
    """A candidate whose loop saves its training, and goes on from it, as the options say."""

    def loop_resumes_by(self) -> Mapping[str, tuple[str, ...]]:
        """Return the ways in which the loop goes on, values of `TrainingOptions.resume`, and what may be another then.

        As in `WayToResume.other_sizes`.
        """

    def trained(self) -> tuple[Any, Any]:
        """Return the module or engine that is trained, and its optimizer; None for that of an engine."""

    def counters(self) -> Mapping[str, Any]:
        """Return what the library counts, such as `STEPS_TAKEN`, by name."""


@runtime_checkable
class HoldsOptimizerState(Protocol):
    """A candidate that can tell what its optimizer holds."""

    def optimizer_state(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return copies of the moments, and of the float32 `master`, of this rank's TP shard of a parameter.

        Each has the shape of the shard, gathered over DP. Collective over the DP group.
        """


@runtime_checkable
class ScalesLosses(Protocol):
    """A candidate that may multiply losses by a scale, and skip the step where gradients overflow.

    `Candidate.gradient` and `Candidate.gradient_norm` are without it.
    """

    def loss_scale(self) -> float:
        """Return by what the loss of the next backward pass is multiplied; 1 for nothing."""

    def has_skipped(self) -> bool:
        """Return whether the last step was skipped."""


@runtime_checkable
class SumsLosses(Protocol):
    """A candidate whose backward pass is that of a sum of losses: what it is divided by comes later."""

    def backward_factor(self) -> float:
        """Return by how much gradients of modules are larger than those of the mean over micro-batches."""


@runtime_checkable
class SavesCheckpoints(Protocol):
    """A candidate whose saved checkpoints can be verified."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        """Return the public ways to save the model, by name. Each writes into an empty folder, collectively."""


STEPS_TAKEN = "steps taken"
"""The counter of a resumed training that chooses its next batch."""


@dataclass(frozen=True, slots=True)
class WayToResume:
    """A public way to save a training and to go on from it.

    Attributes:
        save: Writes everything into an empty folder. Collective over the world.
        load: Reads it into a new candidate. Collective over the world.
        config: Backend configuration that the candidate which loads is made with, merged over that of the run.
        other_sizes: What may be another when it is loaded: `tp`, `dp` and `zero`.
    """

    save: Callable[[Path], None]
    load: Callable[[Path], None]
    config: Mapping[str, Any] = field(default_factory=dict)
    other_sizes: tuple[str, ...] = ()


@runtime_checkable
class ResumesTraining(Protocol):
    """A candidate whose training can be saved and resumed."""

    def ways_to_resume(self) -> Mapping[str, WayToResume]:
        """Return the public ways to save a training with its optimizer, by name."""

    def trained(self) -> tuple[Any, Any]:
        """Return the module or engine that is trained, and its optimizer; None for that of an engine."""

    def counters(self) -> Mapping[str, Any]:
        """Return what the library counts, such as `STEPS_TAKEN`, by name."""


@dataclass(frozen=True, slots=True)
class WayToInitialise:
    """A way to make a model from scratch, with and without tensor parallelism.

    Both are called on every rank after torch's, Python's and numpy's generators were given the seed, the same on all.

    Attributes:
        unsharded: seed -> the unsharded model, of this rank alone.
        sharded: seed -> the sharded model. Collective over the world.
    """

    unsharded: Callable[[int], nn.Module]
    sharded: Callable[[int], Candidate]


@runtime_checkable
class InitialisesModels(Protocol):
    """A backend under which models are made from scratch."""

    def ways_to_initialise(
        self, build: Callable[[], nn.Module], rank: RankLike, options: TrainingOptions
    ) -> Mapping[str, WayToInitialise]:
        """Return the ways in which its users make models from scratch, by name.

        Args:
            build: Makes the unsharded model of the user, as it is: nothing is redrawn or cast.
        """


@runtime_checkable
class ReadsLayouts(Protocol):
    """A backend that can read the layouts of a live model which somebody else's program has sharded."""

    def layouts_of(self, model: nn.Module) -> Mapping[str, Layout]:
        """Return the layouts of the parameters of this backend's layers. Collective over the TP group."""


class Backend(Protocol):
    """Shards a model."""

    @property
    def name(self) -> str:
        """The name in reports."""

    def versions(self) -> Mapping[str, str]:
        """Return the versions of the packages under test."""

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        """Return the options with what `options.config` sets; both sides train by the result.

        Raises:
            UsageError: The configuration contradicts the other options, or sets something that the reference lacks.
        """

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        """Return a context in which models of `options.dtype` can be built, sharded and trained on this machine.

        Collective over the world. The unsharded model is built and trained in it, too.
        """

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        """Shard `model` in place and make it trainable. Collective over the world."""


@runtime_checkable
class HasConfigVariants(Protocol):
    """A backend with settings that must not change the result of training. `tpcheck fuzz FAMILY` draws from them."""

    def config_variants(self) -> Sequence[Mapping[str, Any]]:
        """Return pieces of configuration, any of which may be merged."""


Extent = Literal["whole", "part", "rows"]
ReplacedLayer = Literal["linear", "embedding", "transposed_linear"]


class LayerSizes(Protocol):
    """What a plain layer is made of."""

    @property
    def inputs(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    @property
    def bias(self) -> bool: ...

    @property
    def tp(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ParallelLayer:
    """One kind of tensor-parallel layer.

    Attributes:
        name: The backend's name for it.
        plain: What it replaces: `linear`, `embedding`, or `transposed_linear` (a weight of inputs x outputs, as in
            GPT-2); or a function that makes the plain module, whose input has `inputs` features.
        input, output: Whether each rank takes (and returns) the whole, its part of the last dim, or its part of dim
            `rows_dim`, which then is a multiple of the TP size.
        shard: Turns a plain layer into this rank's parallel layer. Collective over the TP group. None where the layer
            is not tried.
        out_blocks, in_blocks: How many blocks of one size are fused in the weight's outputs and inputs.
        part_of: The parameter whose rows (or columns) say which part of the last dim a rank has.
        rows_dim: The dim of `rows`.
        num_rows: How many dims before the last one it takes; None for any number.
        trains: Whether it has a backward pass.
        replicates: Which parameters every rank holds whole by design: their names begin so. Another that they all hold
            whole is not sharded, and the layer is refused.
        reduce_gradients: What the library does to the gradients of such a layer after the backward pass of a step.
        why_not: Why it is not tried.
    """

    name: str
    plain: ReplacedLayer | Callable[[LayerSizes], nn.Module] = "linear"
    input: Extent = "whole"
    output: Extent = "whole"
    shard: Callable[[nn.Module, RankLike], nn.Module] | None = None
    out_blocks: int = 1
    in_blocks: int = 1
    part_of: str = "weight"
    rows_dim: int = 0
    num_rows: int | None = None
    trains: bool = True
    replicates: tuple[str, ...] = ()
    reduce_gradients: Callable[[nn.Module, RankLike], None] | None = None
    why_not: str = ""


NO_ROW = "tpcheck cannot test this layer yet"
"""`ParallelLayer.why_not` of a layer that the installed version has and the backend's table lacks."""


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Every kind of layer of an installed backend.

    Attributes:
        layers: The kinds.
        options: Settings that all layers share, with the values that each may take, the default first.
        session: Returns a context in which layers can be made and run under such settings.
    """

    layers: Sequence[ParallelLayer]
    options: Mapping[str, tuple[Any, ...]]
    session: Callable[[Mapping[str, Any]], AbstractContextManager[None]]


@runtime_checkable
class HasLayerTable(Protocol):
    """A backend whose layers can be tried one by one. `tpcheck fuzz --layers` does."""

    def layer_table(self) -> LayerTable:
        """Return the layers of the installed version."""
