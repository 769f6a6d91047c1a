"""A Megatron model as a candidate: wrapped in DistributedDataParallel, under the groups that it was built for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import nn

from tpcheck.backends.layout import Layout
from tpcheck.backends.live_groups import distinct_ranks
from tpcheck.backends.megatron.groups import Groups, use_groups
from tpcheck.backends.sgd import Sgd


class MegatronCandidate:
    """Implements `adapters.Candidate` by what Megatron leaves in `main_grad`."""

    def __init__(self, ddp: Any, groups: Groups, layouts: Mapping[str, Layout], sgd: Sgd) -> None:
        self._ddp = ddp
        self._groups = groups
        self._layouts = layouts
        self._sgd = sgd
        self._norm: float | None = None
        self._parameters = dict(self.module.named_parameters(remove_duplicate=False))

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._ddp.module
        return module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that steps; an injected fault may change it."""
        return self._sgd.optimizer

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        with use_groups(self._groups):
            tp = [parallel_state.get_tensor_model_parallel_group(), *self._layer_groups()]
            dp = [parallel_state.get_data_parallel_group(), self._ddp.dp_group]
        return {"tp": distinct_ranks(tp), "dp": distinct_ranks(dp)}

    def layouts(self) -> Mapping[str, Layout]:
        return self._layouts

    def parameter(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach().clone()

    def gradient(self, name: str) -> torch.Tensor | None:
        gradient: torch.Tensor | None = getattr(self._parameters[name], "main_grad", None)
        return None if gradient is None else gradient.detach().clone()

    def forward(self, batch: Mapping[str, Any]) -> Any:
        with use_groups(self._groups):
            return self._ddp(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        with use_groups(self._groups):
            loss.backward()  # type: ignore[no-untyped-call]
            finalize_model_grads([self._ddp])

    def step(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = getattr(parameter, "main_grad", None)
        with use_groups(self._groups):
            self._norm = self._sgd.step()
        self._ddp.zero_grad_buffer()

    def gradient_norm(self) -> float | None:
        return self._norm

    def _layer_groups(self) -> Iterator[Any]:
        for module in self.module.modules():
            group = getattr(module, "tp_group", None)
            if isinstance(group, dist.ProcessGroup):
                yield group
