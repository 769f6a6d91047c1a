"""Shards a model as users of transformers do: saved, and loaded with a distributed configuration."""

from __future__ import annotations

import atexit
import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.trainer_utils import get_last_checkpoint

from tpcheck.backends.dtensor.candidate import DTensorCandidate, clip_by_mesh
from tpcheck.backends.initialisation import NotInitialised
from tpcheck.backends.interface import Candidate, LayerTable, RankLike, TrainingOptions, WayToInitialise
from tpcheck.backends.layout import Layout
from tpcheck.backends.limits import require_within_limits
from tpcheck.backends.peft_models import is_peft_model
from tpcheck.backends.sgd import Sgd
from tpcheck.backends.transformers.adapters import add_adapters
from tpcheck.backends.transformers.candidate import TransformersCandidate
from tpcheck.core.environment import WORLD_FOLDER_VARIABLE
from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology

# Versions before `DistributedConfig` had a `tp_size`: `tp_plan="auto"`, whose shards may be plain tensors.
BEFORE_TP_SIZE = "tp_size" not in {field.name for field in fields(DistributedConfig)}
_SETTINGS_BEFORE_TP_SIZE = ("tp_plan",)
_BUCKET_BYTES = 250 << 20  # of a broadcast, as in DDP


class TransformersBackend:
    """The model's tp_plan, over FSDP2 where dp is above 1, trained as transformers' Trainer trains."""

    name = "transformers"

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        require_within_limits(self.name, options)
        if BEFORE_TP_SIZE:
            if options.loop != "plain":
                raise UsageError(
                    "loop", options.loop, "plain: this version's Trainer knows no model sharded at loading"
                )
            return resolved_before_tp_size(options)
        known = [field.name for field in fields(DistributedConfig)]
        for name in options.config:
            if name not in known:
                raise UsageError("config", name, known)
        if options.config.get("pp_size") not in (None, 1):
            raise UsageError("config.pp_size", options.config["pp_size"], "1: pipelines are not verified")
        if options.loop == "trainer":
            from tpcheck.backends.trainer_loop.options import resolved_for_trainer  # imports the Trainer, for seconds

            return resolved_for_trainer(replace(options, masters=False))  # the Trainer steps the weights that it has
        return options

    def layer_table(self) -> LayerTable:
        from tpcheck.backends.transformers.layer_table import layer_table  # imports names that other versions lack

        return layer_table()

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        if options.loop == "plain":
            return nullcontext()
        from tpcheck.backends.trainer_loop.stand_ins import trainer_session

        return trainer_session()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        if BEFORE_TP_SIZE:
            return _shard_before_tp_size(model, rank, options)
        config = distributed_config(options.config, rank.topology)
        if is_peft_model(model):
            sharded = add_adapters(partial(save_and_load, dtype=options.dtype, distributed_config=config), model)
            copy_unsaved_settings(model, sharded)
        else:
            folder = _checkpoint_with_weights(options)
            sharded = save_and_load(model, options.dtype, folder, distributed_config=config)
        if options.loop == "trainer":
            from tpcheck.backends.transformers.trainer import TrainerCandidate

            return TrainerCandidate(sharded, rank, options)
        return _candidate(sharded, rank, options)

    def ways_to_initialise(
        self, build: Callable[[], nn.Module], rank: RankLike, options: TrainingOptions
    ) -> Mapping[str, WayToInitialise]:
        if BEFORE_TP_SIZE:
            return {}
        model = build()
        if not isinstance(model, PreTrainedModel):
            raise NotInitialised(f"{type(model).__name__} is no transformers.PreTrainedModel")

        def load(**how: Any) -> PreTrainedModel:
            """Let transformers initialise all weights: it is given none."""
            config = copy.deepcopy(model.config)
            loaded: PreTrainedModel = type(model).from_pretrained(
                None, config=config, state_dict={}, dtype=options.dtype, **how
            )
            return loaded.to(rank.device)

        def sharded(seed: int) -> Candidate:
            config = distributed_config(options.config, rank.topology)
            return _candidate(load(distributed_config=config), rank, options)

        return {"from_pretrained without weights": WayToInitialise(lambda seed: load(), sharded)}


def _checkpoint_with_weights(options: TrainingOptions) -> str | None:
    """Return the Trainer's last checkpoint where the model is to be made from it."""
    if not options.resume:
        return None
    from tpcheck.backends.trainer_loop.loop import RESUMED_WITH_WEIGHTS  # imports the Trainer, for seconds

    folder: str | None = get_last_checkpoint(options.checkpoints)
    return folder if options.resume == RESUMED_WITH_WEIGHTS else None


def _candidate(sharded: PreTrainedModel, rank: RankLike, options: TrainingOptions) -> Candidate:
    sync_replicated_parameters(sharded)
    sgd = Sgd(list(sharded.parameters()), options, clip_by_mesh)
    return TransformersCandidate(sharded, rank, sgd, accumulate=options.accumulate)


def distributed_config(config: Mapping[str, Any], topology: Topology) -> DistributedConfig:
    """Return the configuration for `from_pretrained`: TP innermost, FSDP2 over the DP ranks.

    Raises:
        UsageError: The user's configuration contradicts the topology.
    """
    replicas = config.get("dp_replicate_size") or 1
    if topology.dp % replicas:
        raise UsageError("config.dp_replicate_size", replicas, f"a divisor of dp={topology.dp}")
    sizes = {"tp_size": topology.tp, "fsdp_size": topology.dp // int(replicas)}
    for name, size in sizes.items():
        if config.get(name) not in (None, size):
            raise UsageError(f"config.{name}", config[name], f"{size}, as the topology requires")
    return DistributedConfig(**{**sizes, **config})


def sync_replicated_parameters(model: nn.Module) -> None:
    """Broadcast plain parameters from the first rank, and average their gradients over all ranks.

    The same as `Trainer._sync_replicated_trainable_parameters` of transformers 5.23, whose hooks run before those that
    the parallel styles register in the first forward pass; importing the Trainer takes seconds.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    replicated = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and not isinstance(parameter.data, DTensor)
    ]
    if replicated:  # under FSDP none is
        broadcast: Any = dist._broadcast_coalesced  # type: ignore[attr-defined]  # the Trainer sends each by itself
        broadcast(dist.group.WORLD, [parameter.data for parameter in replicated], _BUCKET_BYTES, 0)
    for parameter in replicated:
        parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]


def _average_gradient(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)  # a sum, since gloo has no AVG
    parameter.grad.div_(dist.get_world_size())


def save_and_load(model: nn.Module, dtype: torch.dtype, folder: str | None = None, **how: Any) -> PreTrainedModel:
    """Return the model as `from_pretrained(folder, **how)` shards it. Collective over the world.

    Args:
        folder: Where its weights are saved already; None to save those of `model`.

    Raises:
        UsageError: The model is not a `PreTrainedModel`.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError("build", type(model).__name__, "a transformers.PreTrainedModel, or a PEFT model around one")
    with _saved(model) if folder is None else nullcontext(folder) as path:
        sharded: PreTrainedModel = type(model).from_pretrained(
            path, config=copy.deepcopy(model.config), dtype=dtype, **how
        )
    copy_unsaved_settings(model, sharded)
    return sharded


@contextmanager
def _saved(model: PreTrainedModel) -> Iterator[str]:
    with _shared_folder() as folder:
        model.save_pretrained(folder)  # only the first rank writes
        if dist.is_initialized():
            dist.barrier()
        yield folder


@contextmanager
def _shared_folder() -> Iterator[str]:
    """Make a folder that every rank on this machine reads, and remove it once all of them have left the context.

    After an error others may still be reading, and are not to fail for a missing folder: it goes with its process, or
    with the world, whose ranks end without finalizers.
    """
    created = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        created = tempfile.mkdtemp(prefix="tpcheck-loaded-", dir=os.environ.get(WORLD_FOLDER_VARIABLE))
        atexit.register(shutil.rmtree, created, ignore_errors=True)
    names = [created]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    yield str(names[0])
    if dist.is_initialized():
        dist.barrier()
    if created is not None:
        shutil.rmtree(created, ignore_errors=True)


def copy_unsaved_settings(model: nn.Module, sharded: nn.Module) -> None:
    """Copy what files do not carry: training mode, frozen parameters, and dropout that was switched off."""
    sharded.train(model.training)
    modules = dict(model.named_modules())
    for name, module in sharded.named_modules():
        for setting, value in vars(modules[name]).items() if name in modules else ():
            if isinstance(value, float) and not value and getattr(module, setting, None):
                setattr(module, setting, value)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in sharded.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def resolved_before_tp_size(options: TrainingOptions) -> TrainingOptions:
    """Return the options without clipping: torch cannot tell that a plain tensor is a shard, so its norm is local.

    Raises:
        UsageError: A setting that this version does not take.
    """
    for name in options.config:
        if name not in _SETTINGS_BEFORE_TP_SIZE:
            raise UsageError("config", name, _SETTINGS_BEFORE_TP_SIZE)
    return replace(options, max_grad_norm=0.0)


def _shard_before_tp_size(model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
    """Return the model as `from_pretrained(tp_plan="auto")` shards it. Collective over the world.

    Raises:
        UsageError: There is more than one DP rank.
    """
    topology = rank.topology
    if topology.dp > 1:
        raise UsageError("dp", topology.dp, "1: this version of transformers shards over tp alone")
    plan = {"tp_plan": options.config.get("tp_plan", "auto"), "tp_size": topology.tp}
    sharded = save_and_load(model, options.dtype, **plan)
    if all(isinstance(parameter.data, DTensor) for parameter in sharded.parameters()):
        layouts: dict[str, Layout] = {}
    else:
        layouts = _layouts_of_plain_tensors(model, save_and_load(_with_positions(model), torch.float64, **plan), rank)
    sgd = Sgd(list(sharded.parameters()), options, None)
    return _PlainShardsCandidate(sharded, rank, sgd, layouts, options.accumulate)


class _PlainShardsCandidate(DTensorCandidate):
    """A model whose shards may be plain tensors, with their layouts."""

    def __init__(
        self, module: nn.Module, rank: RankLike, sgd: Sgd, layouts: Mapping[str, Layout], accumulate: int
    ) -> None:
        super().__init__(module, rank, sgd, accumulate=accumulate)
        self._layouts = layouts
        self._named = super()._parameters()  # a row-parallel layer hides its bias in the first forward pass

    def _parameter(self, name: str) -> nn.Parameter:
        return self._named[name]

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._named

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        mesh: Any = self.module._device_mesh
        return {"tp": (tuple(dist.get_process_group_ranks(mesh.get_group())),)}

    def layouts(self) -> Mapping[str, Layout]:
        return {**super().layouts(), **self._layouts}


def _with_positions(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters hold the flat position of each of their elements, exact in float64."""
    twin = copy.deepcopy(model).to(torch.float64)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape))
    return twin


def _layouts_of_plain_tensors(model: nn.Module, twin: nn.Module, rank: RankLike) -> dict[str, Layout]:
    """Return the layouts of plain tensors from the positions in the sharded twin, whatever the plan's styles do.

    Collective over TP.
    """
    shards = {
        name: parameter.detach().to(torch.int64)
        for name, parameter in twin.named_parameters(remove_duplicate=False)
        if not isinstance(parameter.data, DTensor)
    }
    by_rank: list[dict[str, torch.Tensor]] = [{}] * rank.topology.tp
    dist.all_gather_object(by_rank, shards, group=rank.group("tp"))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: layout_of(shapes[name], [rank[name] for rank in by_rank]) for name in shards if name in shapes}


def layout_of(shape: tuple[int, ...], shards: list[torch.Tensor]) -> Layout:
    """Return the layout of shards that hold positions; replicated where every shard has the full shape."""
    if all(tuple(shard.shape) == shape for shard in shards):
        return Layout.replicated(shape, len(shards))
    return Layout.from_positions(shape, shards)
