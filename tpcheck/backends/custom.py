"""Sharding code that the user brings: a function shards the model, a mapping gives the placements of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tpcheck.backends.dtensor.backend import require_unsharded
from tpcheck.backends.dtensor.candidate import DTensorCandidate, is_over
from tpcheck.backends.initialisation import BUILT_THEN_SHARDED, built_then_sharded
from tpcheck.backends.interface import Candidate, RankLike, TrainingOptions, WayToInitialise
from tpcheck.backends.layout import Layout
from tpcheck.backends.limits import require_within_limits
from tpcheck.backends.sgd import Clip, Sgd
from tpcheck.core.errors import UsageError
from tpcheck.core.placement import Placement, Replicate, Shard

Shape = tuple[int, ...]
PlacementSource = Mapping[str, Placement] | Callable[[str, Shape], Placement | None] | None


def layouts_by_pattern(
    source: PlacementSource, parameters: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape], rank: RankLike
) -> dict[str, Layout]:
    """Return the layout of every parameter that is not a DTensor.

    Args:
        source: The user's placements: by pattern of parameter names, or a function of name and shape.
        parameters: The parameters on this rank.
        shapes: The shapes of the unsharded model.
        rank: The rank that this runs on.

    Raises:
        UsageError: A placement does not fit the shapes, or a pattern matches no parameter.
    """
    for pattern in source if isinstance(source, Mapping) else ():
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UsageError("layout", pattern, f"a pattern of parameter names, such as {next(iter(parameters), '*')}")
    tp_rank = rank.topology.coordinate(rank.rank)["tp"]
    layouts = {}
    for name, parameter in parameters.items():
        if name not in shapes or isinstance(parameter.data, DTensor):
            continue
        shape, placement = shapes[name], _placement(source, name, shapes[name])
        if not isinstance(placement, (Shard, Replicate)):
            raise UsageError(f"layout[{name!r}]", placement, "tpcheck.placement.Shard or tpcheck.placement.Replicate")
        if isinstance(placement, Shard) and not -len(shape) <= placement.dim < len(shape):
            raise UsageError(f"layout[{name!r}]", placement, f"a dim of {shape}")
        layouts[name] = Layout.from_placement(shape, placement, rank.topology.tp)
        expected = layouts[name].local_shapes[tp_rank]
        if tuple(parameter.shape) != expected:
            raise UsageError(
                f"layout[{name!r}]",
                placement,
                f"a placement under which rank {rank.rank} holds shape {tuple(parameter.shape)} (full shape "
                f"{shape}, tp={rank.topology.tp}); yours gives {expected}",
            )
    return layouts


def _placement(source: PlacementSource, name: str, shape: Shape) -> Placement:
    if callable(source):
        return source(name, shape) or Replicate()
    matching = (placement for pattern, placement in (source or {}).items() if fnmatchcase(name, pattern))
    return next(matching, Replicate())


ShardModel = Callable[[nn.Module, Any], nn.Module | None]  # model, rank -> the sharded model, or None for the same
ReduceGradients = Callable[[nn.Module, Any], None]  # model, rank


@dataclass(frozen=True, slots=True)
class CustomBackend:
    """Shards by a function.

    Attributes:
        shard_model: Called on every rank with the unsharded model and its `Rank`; shards in place, or returns a module
            whose parameters have the same names.
        layout: Placements by pattern of parameter names, or a function (name, shape) -> placement. A parameter that
            matches no pattern is replicated; parameters that are DTensors need none.
        reduce_gradients: Called after the last backward pass of a step with the model and the rank. Without it,
            gradients that no DTensor reduces are averaged over the DP group.
        clip_gradients: Called before each step with (parameters, largest norm); returns the norm, which is verified.
            Without it neither side clips.
        ways_to_save: Functions (model, folder) that save the model, by name; collective over the world.
    """

    shard_model: ShardModel | None = None
    layout: PlacementSource = None
    reduce_gradients: ReduceGradients | None = None
    clip_gradients: Clip | None = None
    ways_to_save: Mapping[str, Callable[[nn.Module, Path], None]] | None = None
    name: str = "custom"

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if self.shard_model is None:
            raise UsageError("shard", None, "a callable (model, rank) that shards, for backend='custom'")
        require_within_limits("custom", options)
        return options if self.clip_gradients is not None else replace(options, max_grad_norm=0.0)

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        assert self.shard_model is not None
        require_unsharded(model)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
        returned = self.shard_model(model, rank)
        sharded = model if returned is None else returned
        if not isinstance(sharded, nn.Module):
            raise UsageError("shard", type(returned).__name__, "a callable that returns a torch.nn.Module, or None")
        sgd = Sgd(list(sharded.parameters()), options, self.clip_gradients)
        candidate = _SavingCandidate if self.ways_to_save else _CustomCandidate
        return candidate(sharded, rank, sgd, self, shapes, options.accumulate)

    def ways_to_initialise(
        self, build: Callable[[], nn.Module], rank: RankLike, options: TrainingOptions
    ) -> Mapping[str, WayToInitialise]:
        return {BUILT_THEN_SHARDED: built_then_sharded(self, build, rank, options)}


class _CustomCandidate(DTensorCandidate):
    """A model whose layouts come from the user's placements, or from its DTensors."""

    def __init__(
        self,
        module: nn.Module,
        rank: RankLike,
        sgd: Sgd,
        backend: CustomBackend,
        shapes: Mapping[str, Shape],
        accumulate: int,
    ) -> None:
        super().__init__(module, rank, sgd, reduce_gradients=self._reduce, accumulate=accumulate)
        self._backend = backend
        self._shapes = shapes

    def layouts(self) -> Mapping[str, Layout]:
        plain = layouts_by_pattern(self._backend.layout, self._parameters(), self._shapes, self._rank)
        return {**super().layouts(), **plain}

    def _reduce(self, parameters: Sequence[torch.Tensor]) -> None:
        if self._backend.reduce_gradients is not None:
            self._backend.reduce_gradients(self.module, self._rank)
            return
        topology = self._rank.topology
        if topology.dp == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None and not is_over(parameter.grad, "dp", topology):
                # A term of a sum over TP may be averaged as it is: both are linear.
                local = getattr(parameter.grad, "_local_tensor", parameter.grad)
                dist.all_reduce(local, group=self._rank.group("dp"))
                local.div_(topology.dp)


class _SavingCandidate(_CustomCandidate):
    """A custom candidate with ways to save: only then is it a `SavesCheckpoints`."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        return {name: partial(save, self.module) for name, save in (self._backend.ways_to_save or {}).items()}
