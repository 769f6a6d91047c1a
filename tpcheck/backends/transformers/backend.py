"""Shards a model as users of transformers do: saved, and loaded with a distributed configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import transformers
from torch import nn

from tpcheck.adapters import Candidate, TrainingOptions
from tpcheck.adapters.offers import LayerTable
from tpcheck.adapters.protocols import RankLike
from tpcheck.backends.dtensor.candidate import DTensorCandidate
from tpcheck.backends.dtensor.clipping import clip_by_mesh
from tpcheck.backends.sgd import Sgd
from tpcheck.backends.transformers import predecessor
from tpcheck.backends.transformers.config import distributed_config, require_supported, require_usual
from tpcheck.backends.transformers.loading import loaded
from tpcheck.backends.transformers.trainer import sync_replicated_parameters


class TransformersBackend:
    """The model's own tp_plan, over FSDP2 where dp is above 1, trained as transformers' Trainer trains."""

    name = "transformers"

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if predecessor.IS_INSTALLED:
            return predecessor.resolved_options(require_usual(options))
        return require_supported(options)

    def layer_table(self) -> LayerTable:
        from tpcheck.backends.transformers.layer_table import layer_table  # names that other versions do not have

        return layer_table()

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        if predecessor.IS_INSTALLED:
            return predecessor.shard_by_plan(model, rank, options)
        how = {"distributed_config": distributed_config(options, rank.topology)}
        sharded = loaded(model, how, options.dtype)
        sync_replicated_parameters(sharded)
        return TransformersCandidate(sharded, rank, Sgd(list(sharded.parameters()), options, clip_by_mesh))


class TransformersCandidate(DTensorCandidate):
    """A model that transformers has sharded, and its public ways to save."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        model: transformers.PreTrainedModel = self.module
        return {
            "save_pretrained": lambda folder: model.save_pretrained(str(folder)),
            "save_pretrained, distributed": lambda folder: model.save_pretrained(
                str(folder), distributed_checkpoint=True
            ),
        }
