"""A model that Megatron's DistributedDataParallel wraps, as a candidate's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import nn

from tpcheck.backends.interface import WayToResume
from tpcheck.backends.layout import Layout
from tpcheck.backends.live_groups import distinct_ranks
from tpcheck.backends.megatron.checkpoint import load_training, save_training
from tpcheck.backends.megatron.session import Groups, use_groups
from tpcheck.backends.sgd import Sgd
from tpcheck.core.errors import UsageError

_COUNT = "num_items_in_batch"
IGNORED = -100  # the ignore_index of torch's cross_entropy; Megatron has a loss mask in its place


class MegatronCandidate:
    """Implements `adapters.Candidate` by what Megatron leaves in `main_grad`.

    Args:
        per_token: Add up the losses of all labels, and let `finalize_model_grads` divide by their number over the step
            (`calculate_per_token_loss`). Otherwise the losses of micro-batches are averaged.
    """

    def __init__(
        self,
        ddp: Any,
        groups: Groups,
        layouts: Mapping[str, Layout],
        sgd: Sgd | None,
        accumulate: int = 1,
        *,
        per_token: bool = False,
    ) -> None:
        self.module: nn.Module = ddp.module
        self.optimizer: Any = None if sgd is None else sgd.optimizer  # an injected fault may change it
        self._ddp = ddp
        self._groups = groups
        self._layouts = layouts
        self._sgd: Any = sgd  # None where an optimizer of Megatron's own steps
        self._norm: float | None = None
        self._accumulate = accumulate
        self._num_backward = 0
        self._per_token = per_token
        self._divisor = 1.0  # of the last loss: what turns it into the sum over its labels
        self.num_tokens = 0  # of the micro-batches of a step; an injected fault may change it
        self._parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters(remove_duplicate=False))

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        used = [getattr(module, "tp_group", None) for module in self.module.modules()]
        of_layers = [group for group in used if isinstance(group, dist.ProcessGroup)]
        with use_groups(self._groups):
            tp = [parallel_state.get_tensor_model_parallel_group(), *of_layers]
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
        if self._per_token:
            number = num_labels(batch)
            self.num_tokens += number
            self._divisor = float(batch.get(_COUNT, number))
        with use_groups(self._groups):
            return self._ddp(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        self._num_backward += 1
        is_last = self._num_backward % self._accumulate == 0
        share = self._divisor if self._per_token else 1 / self._accumulate
        with use_groups(self._groups):
            with nullcontext() if is_last else self._ddp.no_sync():  # as forward_backward_no_pipelining does
                (loss * share).backward()  # type: ignore[no-untyped-call]
            if is_last:
                number = torch.tensor(self.num_tokens, device=loss.device) if self._per_token else None
                finalize_model_grads([self._ddp], number)
                self.num_tokens = 0

    def backward_factor(self) -> float:
        return self._divisor * self._accumulate if self._per_token else 1.0

    def step(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = getattr(parameter, "main_grad", None)
        with use_groups(self._groups):
            self._norm = self._sgd.step()
        self._ddp.zero_grad_buffer()

    def gradient_norm(self) -> float | None:
        return self._norm

    def ways_to_resume(self) -> Mapping[str, WayToResume]:
        if self._sgd.has_masters:
            return {}  # masters of tpcheck's own, which Megatron does not save
        return {
            "megatron.core.dist_checkpointing": WayToResume(
                partial(self._under_groups, save_training),
                partial(self._under_groups, load_training),
                other_sizes=("tp", "dp"),
            )
        }

    def _under_groups(self, action: Callable[[nn.Module, torch.optim.Optimizer, Path], None], folder: Path) -> None:
        with use_groups(self._groups):
            action(self.module, self.optimizer, folder)

    def trained(self) -> tuple[Any, Any]:
        return self.module, self.optimizer

    def counters(self) -> Mapping[str, Any]:
        return {}

    def optimizer_state(self, name: str) -> Mapping[str, torch.Tensor]:
        return {state: value.clone() for state, value in self._sgd.state(self._parameters[name]).items()}


def num_labels(batch: Mapping[str, Any]) -> int:
    """Return how many labels of a batch count.

    Raises:
        UsageError: It has none.
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        raise UsageError("batch", sorted(batch), "one with labels, which calculate_per_token_loss counts")
    return int((labels != IGNORED).sum())
