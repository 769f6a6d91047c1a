"""A Megatron model as tpcheck sees it: wrapped in Megatron's DistributedDataParallel, under groups of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import module_from_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import nn

from tpcheck.backends.layout import Layout
from tpcheck.backends.live_groups import distinct_ranks
from tpcheck.backends.sgd import Sgd
from tpcheck.core.topology import Topology

Groups = Mapping[str, Any]  # the globals of parallel_state


def of_topology(topology: Topology) -> Groups:
    """Make the groups of a topology. Collective over the world."""
    return _initialised(topology.tp)


def of_one_rank() -> Groups:
    """Make groups of this rank alone: whatever a model asks for, it is the only one. Collective over the world."""
    made = _initialised(1)
    own = made["_TENSOR_MODEL_PARALLEL_GROUP"]
    return {name: _alone(value, own) for name, value in made.items()}


@contextmanager
def ended_groups() -> Iterator[None]:
    """Destroy the process groups that are made inside when it ends: a program may verify many models."""
    made: list[Any] = []
    new_group = dist.new_group

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(new_group(*args, **kwargs))
        return made[-1]

    with patch.object(dist, "new_group", noted):
        yield
    for group in made:
        if isinstance(group, dist.ProcessGroup):  # else this rank is no member
            dist.destroy_process_group(group)


@contextmanager
def entered(groups: Groups) -> Iterator[None]:
    """Make these the groups that Megatron uses, while inside."""
    with patch.multiple(parallel_state, **groups):
        yield


def _initialised(tp: int) -> Groups:
    """Return the globals of a copy of the module that has been initialised: those of the program stay as they are."""
    spec = parallel_state.__spec__
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    return {
        name: value
        for name, value in vars(copy).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def _alone(value: Any, own: dist.ProcessGroup) -> Any:
    if isinstance(value, dist.ProcessGroup):
        return own
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        return dist.get_process_group_ranks(own)
    return value


class MegatronCandidate:
    """Implements `adapters.Candidate`."""

    def __init__(self, ddp: Any, groups: Groups, layouts: Mapping[str, Layout], sgd: Sgd) -> None:
        self._ddp = ddp
        self._groups = groups
        self._layouts = layouts
        self._sgd = sgd
        self._norm: float | None = None
        self._parameters = dict(self.module.named_parameters(remove_duplicate=False))
        self._reached: set[str] = set()

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._ddp.module
        return module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What steps; a planted fault may change it."""
        return self._sgd.optimizer

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        with entered(self._groups):
            tp = [parallel_state.get_tensor_model_parallel_group(), *self._groups_of_layers()]
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
        with entered(self._groups):
            return self._ddp(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        with entered(self._groups):
            loss.backward()  # type: ignore[no-untyped-call]
            finalize_model_grads([self._ddp])

    def step(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = getattr(parameter, "main_grad", None)
        with entered(self._groups):
            self._norm = self._sgd.step()
        self._ddp.zero_grad_buffer()

    def gradient_norm(self) -> float | None:
        return self._norm

    def _groups_of_layers(self) -> Iterator[Any]:
        for module in self.module.modules():
            group = getattr(module, "tp_group", None)
            if isinstance(group, dist.ProcessGroup):
                yield group
