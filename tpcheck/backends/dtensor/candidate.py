"""A sharded model whose parameters are DTensors, or plain tensors that every TP rank holds in full."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tpcheck.backends.dtensor.layouts import mesh_groups, parameter_layouts, tp_shard
from tpcheck.backends.interface import RankLike
from tpcheck.backends.layout import Layout
from tpcheck.backends.local_part import full_tensor
from tpcheck.backends.sgd import Sgd, clip_gradients


def clip_by_mesh(parameters: Sequence[torch.Tensor], max_norm: float) -> float:
    """Clip as torch does where all gradients share a mesh, else as transformers' Trainer and accelerate do.

    `torch.nn.utils.clip_grad_norm_` refuses gradients on several meshes. The other two make one norm for each mesh with
    torch's `get_total_norm`, and the norm of those norms; plain gradients count once.

    Returns:
        The norm before clipping.
    """
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    if len(by_mesh) <= 1:
        return clip_gradients(parameters, max_norm)
    norms = [
        full_tensor(get_total_norm([parameter.grad for parameter in group if parameter.grad is not None]))
        for group in by_mesh.values()
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        for group in by_mesh.values():
            clip_grads_with_norm_(group, max_norm, total)
    return float(total)


MakeContext = Callable[[], AbstractContextManager[Any]]
ReduceGradients = Callable[[Sequence[torch.Tensor]], None]


class DTensorCandidate:
    """Implements `adapters.Candidate` by the placements of the parameters.

    Args:
        module: The sharded model.
        rank: The rank that it runs on.
        sgd: Steps its parameters.
        reduce_gradients: Called once after each backward pass with the parameters, to reduce what autograd does not.
        context: Makes the context in which forward and backward run.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: RankLike,
        sgd: Sgd,
        *,
        reduce_gradients: ReduceGradients | None = None,
        context: MakeContext = nullcontext,
    ) -> None:
        self._module = module
        self._rank = rank
        self._sgd = sgd
        self._reduce_gradients = reduce_gradients
        self._context = context
        self._norm: float | None = None

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that steps; an injected fault may change it."""
        return self._sgd.optimizer

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        by_axis: dict[str, dict[tuple[int, ...], None]] = {}
        for parameter in self._parameters().values():
            if isinstance(parameter.data, DTensor):
                for axis, ranks in mesh_groups(parameter.data.device_mesh, self._rank.topology):
                    by_axis.setdefault(axis, {})[ranks] = None
        return {axis: tuple(groups) for axis, groups in by_axis.items()}

    def layouts(self) -> Mapping[str, Layout]:
        tensors = {name: parameter.data for name, parameter in self._parameters().items()}
        return parameter_layouts(tensors, self._rank.topology, self._rank.group("tp"))

    def parameter(self, name: str) -> torch.Tensor:
        parameter = self._parameters()[name].data
        return tp_shard(parameter, parameter, self._rank.topology)

    def gradient(self, name: str) -> torch.Tensor | None:
        parameter = self._parameters()[name]
        if parameter.grad is None:
            return None
        return tp_shard(parameter.grad, parameter.data, self._rank.topology)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        with self._context():
            return self._module(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        with self._context():
            loss.backward()  # type: ignore[no-untyped-call]
        if self._reduce_gradients is not None:
            self._reduce_gradients(list(self._module.parameters()))

    def step(self) -> None:
        self._norm = self._sgd.step()

    def gradient_norm(self) -> float | None:
        return self._norm

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._module.named_parameters(remove_duplicate=False))
