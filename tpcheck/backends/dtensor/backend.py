"""Shards a model with torch alone: `parallelize_module` over TP, `fully_shard` over DP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from tpcheck.backends.initialisation import BUILT_THEN_SHARDED, NotInitialised, built_then_sharded
from tpcheck.backends.interface import Candidate, LayerTable, RankLike, TrainingOptions, WayToInitialise
from tpcheck.backends.limits import require_within_limits
from tpcheck.backends.peft_models import is_peft_model, plan_around_adapters, ways_to_save_adapters
from tpcheck.backends.sgd import Sgd
from tpcheck.core.errors import UsageError


class SummedGradients(ParallelStyle):
    """Sum the gradients of a replicated module over TP: each rank computes the term of its own heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        hooked: set[int] = set()

        def sum_gradient(parameter: torch.Tensor) -> None:
            dist.all_reduce(parameter.grad, group=device_mesh.get_group())

        def hook_parameters(module: nn.Module, args: Any) -> None:
            for parameter in module.parameters(recurse=False):  # in the forward pass: fully_shard replaces parameters
                if parameter.requires_grad and id(parameter) not in hooked:
                    hooked.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(sum_gradient)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(hook_parameters)
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
    """Return the plan with a `ParallelStyle` of torch for each module pattern.

    Args:
        plan: The name of a style, or a `ParallelStyle`, by pattern of module names (`layers.*.mlp.up_proj`).

    Raises:
        UsageError: torch has no style of that name.
    """
    for pattern, style in plan.items():
        if not isinstance(style, ParallelStyle) and style not in _STYLES:
            raise UsageError(f"config.plan[{pattern!r}]", style, [*_STYLES, "a torch ParallelStyle"])
    return {pattern: _STYLES[style]() if isinstance(style, str) else style for pattern, style in plan.items()}


class TorchCheckpointCandidate(DTensorCandidate):
    """A candidate that torch.distributed.checkpoint saves."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        return {
            "distributed checkpoint": self._save_distributed,
            "full state dict": self._save_full,
            **ways_to_save_adapters(self.module),
        }

    def _save_distributed(self, folder: Path) -> None:
        save(get_model_state_dict(self.module), checkpoint_id=str(folder))

    def _save_full(self, folder: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.module, options=options)
        if dist.get_rank() == 0:
            torch.save(state, folder / "pytorch_model.bin")


class DTensorBackend:
    """The plan in `config["plan"]`, or the model's tp_plan in torch's styles.

    With `config["loss_parallel"]`, forward and backward run in torch's `loss_parallel`. Above dp=1, FSDP2 wraps each
    layer of every `ModuleList`, and the model.
    """

    name = "dtensor"

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def layer_table(self) -> LayerTable:
        from tpcheck.backends.dtensor.layer_table import layer_table  # verify needs none of its layers

        return layer_table()

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        require_within_limits(self.name, options)
        styles(options.config.get("plan", {}))
        return options

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        require_unsharded(model)
        plan = options.config.get("plan") or model_tp_plan(model)
        mesh = init_device_mesh(rank.device.type, tuple(rank.topology.sizes.values()), mesh_dim_names=("dp", "tp"))
        if rank.topology.tp > 1:
            parallelize_module(model, mesh["tp"], styles(plan), src_data_rank=None)
            restore_tied_embeddings(model)
        if rank.topology.dp > 1:
            for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
                for layer in layers:
                    fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        context = loss_parallel if options.config.get("loss_parallel") else nullcontext
        sgd = Sgd(list(model.parameters()), options, clip_by_mesh)
        return TorchCheckpointCandidate(model, rank, sgd, context=context, accumulate=options.accumulate)

    def ways_to_initialise(
        self, build: Callable[[], nn.Module], rank: RankLike, options: TrainingOptions
    ) -> Mapping[str, WayToInitialise]:
        def on_meta() -> nn.Module:
            with torch.device("meta"):
                return build().to(options.dtype)

        def unsharded(seed: int) -> nn.Module:
            return initialised(on_meta(), rank.device)

        def sharded(seed: int) -> Candidate:
            candidate = self.shard(on_meta(), rank, options)
            initialised(candidate.module, rank.device)
            return candidate

        return {
            BUILT_THEN_SHARDED: built_then_sharded(self, build, rank, options),
            "sharded on the meta device, then initialised": WayToInitialise(unsharded, sharded),
        }


def initialised(model: nn.Module, device: torch.device) -> nn.Module:
    """Materialise a model of the meta device, and initialise it by its `init_weights`, or its modules' own functions.

    Raises:
        NotInitialised: It has none.
    """
    model.to_empty(device=device)
    init_weights = getattr(model, "init_weights", None)
    with torch.no_grad():
        if callable(init_weights):
            init_weights()
            return model
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is None:
                continue
            reset = getattr(module, "reset_parameters", None)
            if not callable(reset):
                what = f"{name or 'the model'} ({type(module).__name__})"
                raise NotInitialised(
                    f"the model has no init_weights, and {what} has parameters and no reset_parameters"
                )
            reset()
    restore_tied_embeddings(model)
    return model


def require_unsharded(model: nn.Module) -> None:
    """Check that no parameter is a DTensor.

    Raises:
        UsageError: The model is already sharded, so there is no reference to compare it with.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, DTensor):
            raise UsageError(
                "build", f"{name}, a DTensor", "the unsharded model; the function that shards it is verify(shard=...)"
            )


def model_tp_plan(model: nn.Module) -> Mapping[str, Any]:
    """Return the tp_plan of a transformers model, under the names of its modules; peft may have added adapters.

    Raises:
        UsageError: The model has no plan.
    """
    plan: Mapping[str, Any] | None = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise UsageError("config.plan", None, f"a dict of styles by module pattern: {type(model).__name__} has no plan")
    return plan_around_adapters(model, plan) if is_peft_model(model) else plan


def restore_tied_embeddings(model: nn.Module) -> None:
    """Tie the embeddings of a transformers model again: parallelize_module gives each module a separate parameter."""
    config = getattr(model, "config", None)
    tie: Callable[[], None] | None = getattr(model, "tie_weights", None)
    if tie is not None and getattr(config, "tie_word_embeddings", False):
        tie()
