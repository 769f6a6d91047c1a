"""The context in which a training loop is recorded, and the trace that is written when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tpcheck.backends.layout import Layout
from tpcheck.backends.live_groups import live_groups
from tpcheck.backends.local_part import local_part
from tpcheck.backends.registry import layouts_of
from tpcheck.core.environment import package_versions
from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.numerics.precision import everything_in_float64
from tpcheck.numerics.tensors import copy_parameters, named_tensors
from tpcheck.runs.replaying import Call, CallRecorder, measure_deviations
from tpcheck.runs.trace import RankRecording, TraceWriter


class Recorder(AbstractContextManager["Recorder"]):
    """Records every call of a model, its backward pass and optimizer step, and writes them when the context ends.

    The end is collective over the world. Nothing is written if the loop raises.
    """

    def __init__(self, model: Any, path: str | Path, topology: Topology | None = None) -> None:
        self._model = _module(model)
        self._topology = _topology(self._model, topology)
        self._writer = TraceWriter(Path(path))
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        parameter = next(self._model.parameters(), None)
        if parameter is None:
            raise UsageError("model", type(self._model).__name__, "a model with parameters")
        self._dtype = parameter.dtype
        self._initial = copy_parameters(self._model)
        self._stack.enter_context(everything_in_float64(self._dtype is torch.float64))
        self._calls = CallRecorder(self._model)
        self._calls.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            self._calls.__exit__(kind, error, traceback)
            if kind is None:
                self._writer.write(self._recorded(self._calls.calls))

    def _recorded(self, calls: Sequence[Call]) -> RankRecording:
        if not calls:
            raise UsageError("model", type(self._model).__name__, "a model that is called inside the context")
        is_unsharded = self._topology.tp == 1
        steps = tuple(call.step() for call in calls)
        return RankRecording(
            rank=_rank(),
            topology=self._topology,
            dtype=str(self._dtype).removeprefix("torch."),
            initial=self._initial,
            buffers=tuple(name for name, _ in self._model.named_buffers()),
            layouts=self._layouts(),
            steps=steps,
            inputs=tuple(_named_inputs(call.args, call.kwargs) for call in calls),
            deviations=measure_deviations(self._model, calls) if is_unsharded else None,
            versions=package_versions(),
        )

    def _layouts(self) -> dict[str, Layout]:
        """Return the layouts that the model's layers know; `compare_traces` takes the others from shapes."""
        return {} if self._topology.tp == 1 else dict(layouts_of(self._model))


def _named_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {path: local_part(tensor) for path, tensor in named_tensors((*args, kwargs) if kwargs else args)}


def _module(model: Any) -> nn.Module:
    """Return the model inside an engine or DistributedDataParallel: its submodules have the reference's names."""
    inner = getattr(model, "module", None)
    module = inner if isinstance(inner, nn.Module) else model
    if not isinstance(module, nn.Module):
        raise UsageError("model", type(model).__name__, "a torch.nn.Module or an engine around one")
    return module


def _topology(model: nn.Module, topology: Topology | None) -> Topology:
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        if topology is not None and topology.world_size > 1:
            raise UsageError("topology", topology, "Topology(), as torch.distributed is not initialised")
        return Topology()
    if topology is None and dist.get_world_size() == 1:
        return Topology()
    groups = live_groups(topology=topology, model=model)
    return Topology.of(world_size=dist.get_world_size(), tp=len(groups.tp))


def _rank() -> int:
    from torch import distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
