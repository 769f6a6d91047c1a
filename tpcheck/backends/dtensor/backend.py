"""Shards a model with torch alone: `parallelize_module` over TP, `fully_shard` over DP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from tpcheck.backends.dtensor.candidate import DTensorCandidate, clip_by_mesh
from tpcheck.backends.protocols import Candidate, RankLike, TrainingOptions
from tpcheck.backends.sgd import Sgd
from tpcheck.core.errors import UsageError


class SummedGradients(ParallelStyle):
    """A module that every rank holds whole and that sees only this rank's heads: its gradients are terms of a sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        known: set[int] = set()

        def sum_gradient(parameter: torch.Tensor) -> None:
            dist.all_reduce(parameter.grad, group=device_mesh.get_group())

        def register(module: nn.Module, args: Any) -> None:
            for parameter in module.parameters(recurse=False):  # fully_shard has replaced those that there were
                if id(parameter) not in known:
                    known.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(sum_gradient)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(register)
        return module


_STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "sequence_parallel": SequenceParallel,
    "replicated_with_grad_allreduce": SummedGradients,
}


def styles(plan: Mapping[str, Any]) -> dict[str, ParallelStyle]:
    """Return the plan with a style of torch for each module pattern.

    Args:
        plan: The name of a style, or a `ParallelStyle`, by pattern of module names (`layers.*.mlp.up_proj`).

    Raises:
        UsageError: A name that torch has no style for.
    """
    return {pattern: _style(pattern, named) for pattern, named in plan.items()}


def _style(pattern: str, named: Any) -> ParallelStyle:
    if isinstance(named, ParallelStyle):
        return named
    if named not in _STYLES:
        raise UsageError(f"config.plan[{pattern!r}]", named, [*_STYLES, "a torch ParallelStyle"])
    return _STYLES[named]()


class SavingCandidate(DTensorCandidate):
    """A candidate that torch's own checkpointing saves."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        return {"distributed checkpoint": self._save_distributed, "full state dict": self._save_full}

    def _save_distributed(self, folder: Path) -> None:
        save(get_model_state_dict(self.module), checkpoint_id=str(folder))

    def _save_full(self, folder: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.module, options=options)
        if dist.get_rank() == 0:
            torch.save(state, folder / "pytorch_model.bin")


_SETTINGS = ("plan", "loss_parallel")


class DTensorBackend:
    """The plan in `config["plan"]`, or the model's own tp_plan in torch's styles.

    With `config["loss_parallel"]`, forward and backward run in torch's `loss_parallel`. Above dp=1, FSDP2 wraps each
    layer of every `ModuleList`, and the model.
    """

    name = "dtensor"

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if options.zero_stage:
            raise UsageError("zero_stage", options.zero_stage, "0: above dp=1 the model is wrapped by fully_shard")
        if options.ignore_plan:
            raise UsageError("ignore_plan", True, "False: torch has no heuristics; give a plan as config.plan")
        for name in options.config:
            if name not in _SETTINGS:
                raise UsageError("config", name, _SETTINGS)
        styles(options.config.get("plan", {}))
        return options

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        require_unsharded(model)
        plan = options.config.get("plan") or own_plan(model)
        mesh = init_device_mesh(rank.device.type, tuple(rank.topology.sizes.values()), mesh_dim_names=("dp", "tp"))
        if rank.topology.tp > 1:
            parallelize_module(model, mesh["tp"], styles(plan), src_data_rank=None)
            _tie_again(model)
        if rank.topology.dp > 1:
            for layer in _layers(model):
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        around = loss_parallel if options.config.get("loss_parallel") else nullcontext
        return SavingCandidate(model, rank, Sgd(list(model.parameters()), options, clip_by_mesh), around=around)


def require_unsharded(model: nn.Module) -> None:
    """Check that the model is no candidate already.

    Raises:
        UsageError: It is made of DTensors, so that there is nothing to compare it with.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, DTensor):
            raise UsageError(
                "build", f"{name}, a DTensor", "the unsharded model; what shards it goes to verify(shard=...)"
            )


def own_plan(model: nn.Module) -> Mapping[str, Any]:
    """Return the plan of a transformers model, under the names of its modules.

    Raises:
        UsageError: It has none.
    """
    plan: Mapping[str, Any] | None = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise UsageError("config.plan", None, f"a dict of styles by module pattern: {type(model).__name__} has no plan")
    return plan


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def _tie_again(model: nn.Module) -> None:
    """Tie embeddings that were tied: parallelize_module gives each module a parameter of its own."""
    config = getattr(model, "config", None)
    tie: Callable[[], None] | None = getattr(model, "tie_weights", None)
    if tie is not None and getattr(config, "tie_word_embeddings", False):
        tie()
