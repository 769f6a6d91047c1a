"""A model made of DTensors, and of plain tensors that every TP rank holds whole, as tpcheck sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tpcheck.adapters import Layout
from tpcheck.adapters.protocols import RankLike
from tpcheck.backends.dtensor.mesh import live_groups
from tpcheck.backends.dtensor.tensors import layouts, tp_shard
from tpcheck.backends.sgd import Sgd

Around = Callable[[], AbstractContextManager[Any]]
ReduceGradients = Callable[[Sequence[torch.Tensor]], None]


class DTensorCandidate:
    """Implements `adapters.Candidate`: everything is read off the placements of the parameters.

    Args:
        module: The sharded model.
        rank: Where it runs.
        sgd: Steps its parameters.
        reduce_gradients: Called once after each backward pass with the parameters, for what autograd does not reduce.
        around: Makes the context in which forward and backward run.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: RankLike,
        sgd: Sgd,
        *,
        reduce_gradients: ReduceGradients | None = None,
        around: Around = nullcontext,
    ) -> None:
        self._module = module
        self._rank = rank
        self._sgd = sgd
        self._reduce_gradients = reduce_gradients
        self._around = around
        self._norm: float | None = None

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What steps; a planted fault may change it."""
        return self._sgd.optimizer

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        found: dict[str, dict[tuple[int, ...], None]] = {}
        for parameter in self._parameters().values():
            if isinstance(parameter.data, DTensor):
                for axis, ranks in live_groups(parameter.data.device_mesh, self._rank.topology):
                    found.setdefault(axis, {})[ranks] = None
        return {axis: tuple(groups) for axis, groups in found.items()}

    def layouts(self) -> Mapping[str, Layout]:
        tensors = {name: parameter.data for name, parameter in self._parameters().items()}
        return layouts(tensors, self._rank.topology, self._rank.group("tp"))

    def parameter(self, name: str) -> torch.Tensor:
        parameter = self._parameters()[name].data
        return tp_shard(parameter, parameter, self._rank.topology)

    def gradient(self, name: str) -> torch.Tensor | None:
        parameter = self._parameters()[name]
        if parameter.grad is None:
            return None
        return tp_shard(parameter.grad, parameter.data, self._rank.topology)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        with self._around():
            return self._module(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        with self._around():
            loss.backward()  # type: ignore[no-untyped-call]
        if self._reduce_gradients is not None:
            self._reduce_gradients(list(self._module.parameters()))

    def step(self) -> None:
        self._norm = self._sgd.step()

    def gradient_norm(self) -> float | None:
        return self._norm

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._module.named_parameters(remove_duplicate=False))
