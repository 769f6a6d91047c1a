"""Logs which collectives a model issues, and in the forward of which module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from tpcheck.records.step import Collective

_NAMESPACES = ("c10d", "_c10d_functional")
# Their operators by what they do, without trailing underscores; anything else (waiting, barriers) moves no data.
_KINDS = {
    "all_reduce": "allreduce allreduce_coalesced all_reduce all_reduce_coalesced",
    "all_gather": "allgather _allgather_base allgather_coalesced allgather_into_tensor_coalesced "
    "all_gather_into_tensor all_gather_into_tensor_out all_gather_into_tensor_coalesced",
    "reduce_scatter": "reduce_scatter _reduce_scatter_base reduce_scatter_tensor_coalesced reduce_scatter_tensor",
    "all_to_all": "alltoall alltoall_base all_to_all_single",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
}
_NAMES = {operator: kind for kind, operators in _KINDS.items() for operator in operators.split()}


@contextmanager
def logged_collectives(model: nn.Module) -> Iterator[list[Collective]]:
    """Yield a list that grows by every collective that is issued inside, with the innermost module of `model` at work.

    Both ways of issuing one are seen: `torch.distributed`, which dispatches to `c10d`, and the functional collectives
    of DTensor. The tensors of subclasses are left to the subclasses, whose own operators are seen instead.
    """
    inside: list[str] = [""]
    log: list[Collective] = []
    handles = [handle for name, module in model.named_modules() for handle in _tracked(name, module, inside)]
    try:
        with _Log(inside, log):
            yield log
    finally:
        for handle in handles:
            handle.remove()


def _tracked(name: str, module: nn.Module, inside: list[str]) -> Iterator[Any]:
    def enter(module: nn.Module, args: Any) -> None:
        inside.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if inside[-1] == name:
            inside.pop()

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, always_call=True)


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator; keeps the collectives."""

    def __init__(self, inside: list[str], log: list[Collective]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inside = inside
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, FakeTensor) for kind in types):  # DTensor works out shapes with them; nothing is sent
            return func(*args, **(kwargs or {}))
        if any(issubclass(kind, torch.Tensor) and kind not in _PLAIN for kind in types):
            return NotImplemented
        name = _NAMES.get(func.overloadpacket.__name__.rstrip("_")) if func.namespace in _NAMESPACES else None
        if name is not None:
            self._log.append(Collective(self._inside[-1], name, _group(args)))
        return func(*args, **(kwargs or {}))


_PLAIN = (torch.Tensor, nn.Parameter)


def _group(args: Any) -> tuple[int, ...]:
    """Return the global ranks of the group among an operator's arguments; none where it cannot be told."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and str(arg._type()).endswith(".ProcessGroup"):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg)))
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    names = [arg for arg in args if isinstance(arg, str)]  # functional collectives name their group last
    try:
        return tuple(dist.get_process_group_ranks(resolve(names[-1]))) if names else ()
    except (RuntimeError, ValueError):
        return ()
