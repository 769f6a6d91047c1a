"""Names of parallel styles, as in transformers' plans, and the styles of torch that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from tpcheck.errors import UsageError


class SummedGradients(ParallelStyle):
    """A module that every rank holds whole and that sees only this rank's heads: its gradients are terms of a sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        known: set[int] = set()

        def sum_gradient(parameter: torch.Tensor) -> None:
            dist.all_reduce(parameter.grad, group=device_mesh.get_group())

        def register(module: nn.Module, args: Any) -> None:
            for parameter in module.parameters(recurse=False):  # fully_shard has replaced those that there were
                if id(parameter) not in known:
                    known.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(sum_gradient)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(register)
        return module


_STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "sequence_parallel": SequenceParallel,
    "replicated_with_grad_allreduce": SummedGradients,
}


def styles(plan: Mapping[str, Any]) -> dict[str, ParallelStyle]:
    """Return the plan with a style of torch for each module pattern.

    Args:
        plan: The name of a style, or a `ParallelStyle`, by pattern of module names (`layers.*.mlp.up_proj`).

    Raises:
        UsageError: A name that torch has no style for.
    """
    return {pattern: _style(pattern, named) for pattern, named in plan.items()}


def _style(pattern: str, named: Any) -> ParallelStyle:
    if isinstance(named, ParallelStyle):
        return named
    if named not in _STYLES:
        raise UsageError(f"config.plan[{pattern!r}]", named, [*_STYLES, "a torch ParallelStyle"])
    return _STYLES[named]()
