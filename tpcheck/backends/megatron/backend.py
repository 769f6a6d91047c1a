"""Shards a model as Megatron does, built a second time under the process groups of the topology, and trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from tpcheck.backends.interface import Candidate, LayerTable, RankLike, TrainingOptions, WayToInitialise
from tpcheck.backends.layout import Layout
from tpcheck.backends.megatron.candidate import IGNORED, MegatronCandidate
from tpcheck.backends.megatron.config import (
    DISTRIBUTED,
    configured,
    megatron_config,
    require_configured,
    require_supported,
    transformer_config,
)
from tpcheck.backends.megatron.distributed_optimizer import (
    DistributedOptimizerCandidate,
    decayed_by_megatron,
    distributed_optimizer,
)
from tpcheck.backends.megatron.session import (
    Groups,
    destroy_new_groups,
    groups_of_one_rank,
    groups_of_topology,
    has_a_gpu_each,
    model_parallel_generators,
    runs_anywhere,
    use_groups,
)
from tpcheck.backends.sgd import LOW_PRECISION, Sgd
from tpcheck.core.errors import UsageError
from tpcheck.core.placement import Replicate, Shard


class MegatronBackend:
    """Megatron-core's layers, DistributedDataParallel and `finalize_model_grads`.

    `build` makes the model under the process groups that Megatron has at that time: of one rank for the unsharded
    model, of the topology for the sharded model, whose shards are then filled from the unsharded weights.
    """

    name = "megatron"

    def versions(self) -> dict[str, str]:
        return {"megatron-core": megatron.core.__version__}

    def layer_table(self) -> LayerTable:
        from tpcheck.backends.megatron.layer_table import layer_table  # verify needs none of its layers

        return layer_table()

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        require_supported(options)
        if not options.config.get(DISTRIBUTED):
            return options
        return replace(options, decayed_parameters=decayed_by_megatron)

    @contextmanager
    def session(self, options: TrainingOptions) -> Iterator[None]:
        with destroy_new_groups(), runs_anywhere(), configured(1, options.config), use_groups(groups_of_one_rank()):
            yield

    def layouts_of(self, model: nn.Module) -> Mapping[str, Layout]:
        return layouts_by_marks(model)

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        if options.rebuild is None:
            raise UsageError(
                "options.rebuild", None, "a callable that builds the model again: Megatron shards while it builds"
            )
        megatron_config(model)  # raises where the model has none
        if rank.device.type == "cuda" and not has_a_gpu_each():
            raise UsageError("device", "cuda", "cpu, or a GPU for each rank: Megatron is run on one of its own")
        tp = rank.topology.tp
        groups = groups_of_topology(rank.topology)
        with use_groups(groups), configured(tp, options.config):
            sharded = options.rebuild()
            require_configured(sharded, tp, options.config)
            layouts = parameter_layouts(sharded, model, tp)
            fill_shards(sharded, model, layouts, rank)
        return _candidate(sharded, layouts, groups, rank, options)

    def ways_to_initialise(
        self, build: Callable[[], nn.Module], rank: RankLike, options: TrainingOptions
    ) -> Mapping[str, WayToInitialise]:
        whole, groups, one_rank = build(), groups_of_topology(rank.topology), groups_of_one_rank()
        megatron_config(whole)  # raises where the model has none

        def way(*, draws_whole: bool) -> WayToInitialise:
            def made(seed: int, groups: Groups, tp: int) -> nn.Module:
                with (
                    use_groups(groups),
                    configured(tp, options.config, draws_whole=draws_whole),
                    model_parallel_generators(seed, groups),
                ):
                    return build().to(rank.device, options.dtype)

            def sharded(seed: int) -> Candidate:
                model = made(seed, groups, rank.topology.tp)
                return _candidate(model, parameter_layouts(model, whole, rank.topology.tp), groups, rank, options)

            return WayToInitialise(lambda seed: made(seed, one_rank, 1), sharded)

        return {
            "use_cpu_initialization": way(draws_whole=True),
            "model-parallel generators": way(draws_whole=False),
        }


def _candidate(
    sharded: nn.Module, layouts: Mapping[str, Layout], groups: Groups, rank: RankLike, options: TrainingOptions
) -> MegatronCandidate:
    with use_groups(groups), configured(rank.topology.tp, options.config):
        config = transformer_config(sharded, rank.topology.tp)
        is_distributed = bool(options.config.get(DISTRIBUTED))
        reduced_in_fp32 = is_distributed and options.dtype in LOW_PRECISION
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=is_distributed, grad_reduce_in_fp32=reduced_in_fp32
        )
        ddp = DistributedDataParallel(config, ddp_config, sharded)
        per_token = bool(config.calculate_per_token_loss)
        if is_distributed:
            optimizer = distributed_optimizer(ddp, options)
            return DistributedOptimizerCandidate(
                ddp, groups, layouts, optimizer, options.accumulate, per_token=per_token
            )
    return MegatronCandidate(ddp, groups, layouts, sgd_for(sharded, options), options.accumulate, per_token=per_token)


def sgd_for(model: nn.Module, options: TrainingOptions) -> Sgd:
    """Return an optimizer of the model's parameters that clips by Megatron's norm; Megatron's optimizers need CUDA.

    Its groups have the marks by which Megatron finds a group in a checkpoint, which torch's optimizers do not read
    (optimizer.py:param_group_identifier_keys).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def clip(masters: Sequence[torch.Tensor], max_norm: float) -> float:
        counted = [
            master.grad
            for parameter, master in zip(parameters, masters, strict=True)
            if master.grad is not None
            and param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        norm: float = get_grad_norm_fp32(counted, grad_stats_parallel_group=parallel_state.get_model_parallel_group())
        if max_norm > 0:
            clip_grads_with_norm_(masters, max_norm, torch.tensor(norm, dtype=torch.float64))
        return norm

    sgd = Sgd(parameters, options, clip)
    for number, group in enumerate(sgd.optimizer.param_groups):
        group.update(wd_mult=1.0, lr_mult=float(number), is_expert_parallel=False, is_decoupled_lr=False)
    return sgd


class TokenLoss(nn.Module):
    """A `GPTModel` that returns the mean of its losses of all labels that are not -100.

    With `num_items_in_batch` the sum of the losses is divided by that number, as Megatron's loss per token is.

    Args:
        model: Called with token ids, positions, no attention mask (the layers' own is causal), and labels.

    Example:
        >>> TokenLoss(GPTModel(config, get_gpt_layer_local_spec(), 128, 16))  # doctest: +SKIP
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(vocab_size=model.vocab_size)  # that synthetic batches are drawn from

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        counted = labels != IGNORED
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        losses: torch.Tensor = self.model(input_ids, positions, None, labels=labels.where(counted, 0))
        number = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return (losses * counted).sum() / number


Shape = tuple[int, ...]


def parameter_layouts(sharded: nn.Module, model: nn.Module, tp: int) -> dict[str, Layout]:
    """Return the layout of each parameter of `model` over the TP group that `sharded` was built for.

    Raises:
        UsageError: The two are not the same model at two tensor-parallel sizes.
    """
    shards = dict(sharded.named_parameters(remove_duplicate=False))
    full = dict(model.named_parameters(remove_duplicate=False))
    if shards.keys() != full.keys():
        names = ", ".join(sorted(shards.keys() ^ full.keys()))
        raise UsageError("build", names, "a model with the same parameters at every tensor-parallel size")
    return {name: _layout(name, shard, tuple(full[name].shape), tp) for name, shard in shards.items()}


def layouts_by_marks(model: nn.Module) -> dict[str, Layout]:
    """Return the layouts of a live model that Megatron built in another program, without its unsharded shapes."""
    if not parallel_state.model_parallel_is_initialized():
        return {}
    tp = dist.get_world_size(parallel_state.get_tensor_model_parallel_group())
    layouts = {}
    parameters: Iterable[tuple[str, Any]] = model.named_parameters(remove_duplicate=False)
    for name, parameter in parameters:
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= tp
        layouts[name] = _layout(name, parameter, tuple(shape), tp)
    return layouts


def _layout(name: str, shard: Any, shape: Shape, tp: int) -> Layout:
    """Return the layout of one parameter: cut along the dim that is smaller, in as many blocks as its stride.

    The gate and up projections of `linear_fc1` are one parameter of stride 2.

    Raises:
        UsageError: `tp` shards do not make up the full shape.
    """
    local = tuple(shard.shape)
    cut = [dim for dim, sizes in enumerate(zip(shape, local, strict=False)) if len(set(sizes)) > 1]
    if not cut and len(shape) == len(local):
        return Layout.from_placement(shape, Replicate(), tp)
    if len(shape) != len(local) or len(cut) > 1 or local[cut[0]] * tp != shape[cut[0]]:
        raise UsageError(
            "build",
            f"{name} of shape {shape} unsharded and {local} at tp={tp}",
            "a model of the same sizes at every tensor-parallel size: pad the vocabulary for the largest",
        )
    is_marked = getattr(shard, "tensor_model_parallel", False) and shard.partition_dim in cut
    return Layout.from_placement(shape, Shard(cut[0], blocks=shard.partition_stride if is_marked else 1), tp)


def fill_shards(sharded: nn.Module, model: nn.Module, layouts: Mapping[str, Layout], rank: RankLike) -> None:
    """Copy this rank's part of the parameters of `model` to `sharded`."""
    tp_rank = rank.topology.coordinate(rank.rank)["tp"]
    full = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in sharded.named_parameters(remove_duplicate=False):
            parameter.copy_(layouts[name].local(full[name], tp_rank))
            parameter.requires_grad_(full[name].requires_grad)
