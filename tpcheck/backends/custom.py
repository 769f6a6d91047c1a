"""Code of the user's own: what shards is a function, and where the shards lie is said in a line or two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tpcheck.backends.dtensor.backend import require_unsharded
from tpcheck.backends.dtensor.candidate import DTensorCandidate, is_over
from tpcheck.backends.layout import Layout
from tpcheck.backends.protocols import Candidate, RankLike, TrainingOptions
from tpcheck.backends.sgd import Clip, Sgd
from tpcheck.core.errors import UsageError
from tpcheck.core.placement import Placement, Replicate, Shard

Shape = tuple[int, ...]
LayoutSource = Mapping[str, Placement] | Callable[[str, Shape], Placement | None] | None


def declared_layouts(
    source: LayoutSource, parameters: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape], rank: RankLike
) -> dict[str, Layout]:
    """Return the layout of every parameter that is no DTensor.

    Args:
        source: What the user says.
        parameters: What this rank holds.
        shapes: The shapes of the unsharded model.
        rank: Where it runs.

    Raises:
        UsageError: The layout does not fit the shapes, or names no parameter.
    """
    plain = {name: one for name, one in parameters.items() if name in shapes and not isinstance(one.data, DTensor)}
    if isinstance(source, Mapping):
        _require_used(source, parameters)
    found = {}
    for name, parameter in plain.items():
        placement = _placement(source, name, shapes[name])
        found[name] = layout_of(name, placement, shapes[name], rank.topology.tp)
        tp_rank = rank.topology.coordinate(rank.rank)["tp"]
        if tuple(parameter.shape) != found[name].local_shapes[tp_rank]:
            raise UsageError(
                f"layout[{name!r}]",
                placement,
                f"one that gives rank {rank.rank} the shape it holds, {tuple(parameter.shape)}, of "
                f"{shapes[name]} over tp={rank.topology.tp}; this one gives {found[name].local_shapes[tp_rank]}",
            )
    return found


def layout_of(name: str, placement: Placement, shape: Shape, tp: int) -> Layout:
    """Return a placement as an exact layout.

    Raises:
        UsageError: The shape has no such dim or blocks, or a parameter is said to be a sum.
    """
    if not isinstance(placement, (Shard, Replicate)):
        raise UsageError(f"layout[{name!r}]", placement, "tpcheck.core.placement.Shard or Replicate")
    if isinstance(placement, Shard) and not -len(shape) <= placement.dim < len(shape):
        raise UsageError(f"layout[{name!r}]", placement, f"a dim of {shape}")
    return Layout.placed(shape, placement, tp)


def _placement(source: LayoutSource, name: str, shape: Shape) -> Placement:
    if callable(source):
        return source(name, shape) or Replicate()
    for pattern, placement in (source or {}).items():
        if fnmatchcase(name, pattern):
            return placement
    return Replicate()


def _require_used(source: Mapping[str, Placement], parameters: Mapping[str, torch.Tensor]) -> None:
    for pattern in source:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UsageError("layout", pattern, f"a pattern of parameter names, such as {next(iter(parameters), '*')}")


ShardModel = Callable[[nn.Module, Any], nn.Module | None]  # model, rank -> the sharded model, or None for the same
ReduceGradients = Callable[[nn.Module, Any], None]  # model, rank


@dataclass(frozen=True, slots=True)
class CustomBackend:
    """Shards by a function.

    Attributes:
        shard_model: Called on every rank with the unsharded model and its `Rank`; shards in place, or returns a module
            whose parameters bear the same names.
        layout: Placements by pattern of parameter names, or a function (name, shape) -> placement. What matches
            nothing lies whole on every rank; parameters that are DTensors tell themselves.
        reduce_gradients: Called after each backward pass with the model and the rank. Without one, gradients that no
            DTensor reduces are averaged over the DP group.
        clip_gradients: Called before each step with (parameters, largest norm); returns the norm, which is verified.
            Without one neither side clips.
        ways_to_save: Functions (model, folder) that save the model, by name; collective over the world.
    """

    shard_model: ShardModel | None = None
    layout: LayoutSource = None
    reduce_gradients: ReduceGradients | None = None
    clip_gradients: Clip | None = None
    ways_to_save: Mapping[str, Callable[[nn.Module, Path], None]] | None = None
    name: str = "custom"

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if self.shard_model is None:
            raise UsageError("shard", None, "a callable (model, rank) that shards, for backend='custom'")
        if options.zero_stage:
            raise UsageError("zero_stage", options.zero_stage, "0: what shards over dp is your own code's")
        if options.config:
            raise UsageError("config", dict(options.config), "none: your own code has its own settings")
        return options if self.clip_gradients is not None else replace(options, max_grad_norm=0.0)

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        assert self.shard_model is not None
        require_unsharded(model)
        shapes = {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}
        made = self.shard_model(model, rank)
        sharded = model if made is None else made
        if not isinstance(sharded, nn.Module):
            raise UsageError("shard", type(made).__name__, "a callable that returns a torch.nn.Module, or None")
        sgd = Sgd(list(sharded.parameters()), options, self.clip_gradients)
        candidate = _SavingCandidate if self.ways_to_save else _CustomCandidate
        return candidate(sharded, rank, sgd, self, shapes)


class _CustomCandidate(DTensorCandidate):
    """A model whose layouts are declared, or read off DTensors."""

    def __init__(
        self, module: nn.Module, rank: RankLike, sgd: Sgd, backend: CustomBackend, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__(module, rank, sgd, reduce_gradients=self._reduced)
        self._backend = backend
        self._shapes = shapes

    def layouts(self) -> Mapping[str, Layout]:
        told = declared_layouts(self._backend.layout, self._parameters(), self._shapes, self._rank)
        return {**super().layouts(), **told}

    def _reduced(self, parameters: Sequence[torch.Tensor]) -> None:
        if self._backend.reduce_gradients is not None:
            self._backend.reduce_gradients(self.module, self._rank)
            return
        topology = self._rank.topology
        if topology.dp == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None and not is_over(parameter.grad, "dp", topology):
                local = getattr(parameter.grad, "_local_tensor", parameter.grad)
                dist.all_reduce(local, group=self._rank.group("dp"))
                local.div_(topology.dp)


class _SavingCandidate(_CustomCandidate):
    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        def saves(way: Callable[[nn.Module, Path], None]) -> Callable[[Path], None]:
            return lambda folder: way(self.module, folder)

        return {name: saves(way) for name, way in (self._backend.ways_to_save or {}).items()}
