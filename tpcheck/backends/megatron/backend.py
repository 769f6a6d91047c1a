"""Shards a model as Megatron does: it is built once more, under process groups of the topology."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import megatron.core
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from tpcheck.adapters import Candidate, Layout, TrainingOptions
from tpcheck.adapters.protocols import RankLike
from tpcheck.backends.megatron.candidate import MegatronCandidate
from tpcheck.backends.megatron.config import (
    configured,
    megatron_config,
    require_configured,
    require_supported,
    transformer_config,
)
from tpcheck.backends.megatron.groups import ended_groups, entered, of_one_rank, of_topology
from tpcheck.backends.megatron.layouts import fill, layouts, live_layouts
from tpcheck.backends.megatron.machine import stand_ins
from tpcheck.backends.megatron.optimizer import sgd_of
from tpcheck.errors import UsageError


class MegatronBackend:
    """Megatron-core's own layers, DistributedDataParallel and `finalize_model_grads`.

    `build` makes the model with whatever process groups Megatron has: of one rank for the unsharded model, of the
    topology for the sharded one, whose shards are then filled from the unsharded weights.
    """

    name = "megatron"

    def versions(self) -> dict[str, str]:
        return {"megatron-core": megatron.core.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        require_supported(options)
        return options

    @contextmanager
    def session(self, options: TrainingOptions) -> Iterator[None]:
        with ended_groups(), stand_ins(), configured(1, options.config), entered(of_one_rank()):
            yield

    def layouts_of(self, model: nn.Module) -> Mapping[str, Layout]:
        return live_layouts(model)

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        if options.rebuild is None:
            raise UsageError(
                "options.rebuild", None, "what makes the model once more: Megatron's is cut as it is built"
            )
        megatron_config(model)  # of one rank; it is there at all
        groups = of_topology(rank.topology)
        with entered(groups), configured(rank.topology.tp, options.config):
            shards = options.rebuild()
            require_configured(shards, rank.topology.tp, options.config)
            found = layouts(shards, model, rank)
            fill(shards, model, found, rank)
            config = transformer_config(shards, rank.topology.tp)
            ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), shards)
        return MegatronCandidate(ddp, groups, found, sgd_of(shards, options))
