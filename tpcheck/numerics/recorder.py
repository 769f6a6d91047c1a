"""Records what goes into and comes out of every module, forward and backward, and which collectives it issues."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import DebugLevel, get_debug_level
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from tpcheck.core.errors import COLLECTIVES_DIFFER, BackendError
from tpcheck.numerics.data_flow import DataFlow
from tpcheck.numerics.evidence import Collective, Phase, Role, TensorKey
from tpcheck.numerics.precision import torch_function_disabled
from tpcheck.numerics.tensors import map_tensors, named_tensors

Sink = Callable[[TensorKey, torch.Tensor], None]
ForcedValue = Callable[[TensorKey, torch.Tensor], torch.Tensor]


class ModuleRecorder:
    """Passes every floating-point tensor that enters or leaves a module to `sink`, in the order of events.

    Each module is given views of its inputs, so that the gradient of an input is what this module alone sends back,
    whatever else uses the tensor; its caller gets copies of its outputs, which it may change in place without removing
    the hooks. Gradients are recorded as autograd computes them: the order of backward events is that of the backward
    pass. A tensor is passed on without a copy: a sink that keeps it must copy it. Function modes of torch see neither
    what is recorded nor the sink.

    Args:
        model: The model to record; hooks are on its modules while inside the context.
        sink: Called with each tensor.
        forced: Teacher forcing per module: returns what a module is given in place of a tensor, for its inputs and, in
            the backward pass, for the gradients of its outputs. What the module sends back still goes to the producer
            of the tensor that was replaced. `sink` sees that tensor, not the forced one.
        flow: Collects what is computed from what.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> seen = []
        >>> with ModuleRecorder(model, lambda key, tensor: seen.append(str(key))):
        ...     _ = model(torch.ones(1, 2))
        >>> seen
        ['model: input 0', '0: input 0', '0: output 0', 'model: output 0']
    """

    def __init__(
        self, model: nn.Module, sink: Sink, forced: ForcedValue | None = None, flow: DataFlow | None = None
    ) -> None:
        self._model = model
        self._sink = sink
        self._forced = forced
        self._flow = flow
        self._micro_batch = 0
        self._calls: Counter[str] = Counter()
        self._open_calls: dict[str, list[int]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> ModuleRecorder:
        before, after = eager(self._before), eager(self._after)  # once for all modules: either takes 30 us
        for name, module in not_inside_compiled(self._model):
            self._handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(partial(after, name)))
        return self

    def restart(self) -> None:
        """Count the calls of every module from zero again."""
        self._calls.clear()
        self._open_calls.clear()

    def begin_micro_batch(self, number: int) -> None:
        """Record what follows as that of the micro-batch with this number in the step."""
        self._micro_batch = number
        self.restart()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._calls[name]
        self._calls[name] += 1
        self._open_calls.setdefault(name, []).append(call)
        args, kwargs = map_tensors(_view, args), map_tensors(_view, kwargs)
        inputs = (*args, kwargs) if kwargs else args
        with torch_function_disabled():
            self._record(name, call, "input", inputs)
        if self._forced is None:
            return args, kwargs
        forced = {
            id(tensor): self._forced_input(tensor, TensorKey("forward", name, call, "input", path, self._micro_batch))
            for path, tensor in named_tensors(inputs)
            if tensor.is_floating_point()
        }

        def replaced(tensor: torch.Tensor) -> torch.Tensor:
            return forced.get(id(tensor), tensor)

        return map_tensors(replaced, args), map_tensors(replaced, kwargs)

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        calls = self._open_calls.get(name)
        if not calls:  # a backend called the hook without its pre-hook
            return output
        output = map_tensors(_copy, output)
        with torch_function_disabled():
            self._record(name, calls.pop(), "output", output)
        return output

    def _record(self, name: str, call: int, role: Role, value: Any) -> None:
        for path, tensor in named_tensors(value):
            if not tensor.is_floating_point():
                continue
            forward = TensorKey("forward", name, call, role, path, self._micro_batch)
            self._sink(forward, tensor.detach())
            if self._flow is not None:
                self._flow.add(forward, tensor)
            if _has_gradient(tensor):  # without autograd, a hook would see what goes to whatever else uses the tensor
                self._handles.append(
                    tensor.register_hook(  # type: ignore[no-untyped-call]
                        self._gradient_hook(TensorKey("backward", name, call, role, path, self._micro_batch))
                    )
                )

    def _gradient_hook(self, key: TensorKey) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def hook(gradient: torch.Tensor | None) -> torch.Tensor | None:
            if gradient is None:  # DDP's sink hands on outputs that the loss does not use
                return None
            with torch_function_disabled():
                self._sink(key, gradient.detach())
            return self._forced(key, gradient) if self._forced is not None and key.role == "output" else None

        return hook

    def _forced_input(self, tensor: torch.Tensor, key: TensorKey) -> torch.Tensor:
        assert self._forced is not None
        with torch.no_grad():  # checkpointing counts what autograd keeps
            forced = self._forced(key, tensor)
        if forced is tensor or not (tensor.requires_grad and torch.is_grad_enabled()):
            return forced
        replacement: torch.Tensor = _Replace.apply(tensor, forced)  # type: ignore[no-untyped-call]
        return replacement


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled, by `module.compile()` or `torch.compile(module)`."""
    return getattr(module, "_compiled_call_impl", None) is not None or isinstance(
        module, getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
    )


def not_inside_compiled(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for all modules but those inside a compiled one, where a hook would break its graph."""
    seen: set[nn.Module] = set()

    def outside(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield name, module
        for child_name, child in () if is_compiled(module) else module.named_children():
            yield from outside(child, f"{name}.{child_name}" if name else child_name)

    yield from outside(model, "")


def eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook such that torch.compile does not trace it; load no compiler where nothing is compiled."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook  # type: ignore[no-untyped-call]


class _Replace(torch.autograd.Function):
    """Returns `forced` in place of `tensor`, and sends the gradient back to `tensor`."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        return forced.clone()  # a module may change what it is given in place, which a view out of here does not allow

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def _outside_of_modes(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function such that function modes do not see it; subclasses of tensors may need their functions."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not torch.Tensor:
            return change(tensor)
        with torch_function_disabled():
            return change(tensor)

    return changed


@_outside_of_modes
def _view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view_as(tensor) if _has_gradient(tensor) else tensor


@_outside_of_modes
def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if _has_gradient(tensor) else tensor


def _has_gradient(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and tensor.is_floating_point() and torch.is_grad_enabled()


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


@dataclass(slots=True)
class CollectiveLog:
    """What a rank has issued so far, which a crash leaves here.

    Attributes:
        groups: The groups that ranks wait for each other in, by their ranks: those of the axes, and each that the
            system under test has used.
        issued: The collectives, in order.
        num_before: How many of them were issued before the last pass.
        gradients: The activations whose gradients that pass has computed, in order.
        is_in_pass: Whether it has not ended.
    """

    groups: dict[tuple[int, ...], Any] = field(default_factory=dict)
    issued: list[Collective] = field(default_factory=list)
    num_before: int = 0
    gradients: tuple[TensorKey, ...] = ()
    is_in_pass: bool = False

    def meet(self, where: str) -> None:
        """Wait for the other ranks of each group, where torch checks what ranks issue (TORCH_DISTRIBUTED_DEBUG=DETAIL).

        All that ranks issue between two such meetings is the system's under test: a rank that has left out a collective
        fails here, with those that wait for it, and at no collective of tpcheck's own.

        Args:
            where: What has ended, as a phrase.

        Raises:
            BackendError: Another rank issues something else.
        """
        if get_debug_level() != DebugLevel.DETAIL:  # every call returns another object
            return
        for ranks, group in sorted(self.groups.items()):
            if group is None or len(ranks) < 2:
                continue
            try:
                dist.barrier(group)
            except RuntimeError as error:
                if COLLECTIVES_DIFFER not in str(error):
                    raise
                raise BackendError(f"{where}: {error}") from error


@contextmanager
def logged_collectives(
    model: nn.Module,
    log: CollectiveLog,
    phase: Phase = "forward",
    micro_batch: int = 0,
    recorded: dict[TensorKey, Any] | None = None,
    *,
    where: str = "a pass",
) -> Iterator[None]:
    """Log every collective that is issued inside, with the innermost module of `model` running; then let ranks meet.

    Nothing is logged where a module is compiled. Both ways of issuing a collective are seen: `torch.distributed`, which
    dispatches to `c10d`, and the functional collectives of DTensor. Calls on tensor subclasses are left to the
    subclasses, whose inner operators are seen instead.

    Args:
        log: A collective stands there before it is issued.
        phase: What runs inside. In the backward pass no module runs.
        micro_batch: Number of the micro-batch.
        recorded: The activations that are recorded so far, which grow meanwhile.
        where: What runs inside, as a phrase.

    Raises:
        BackendError: Ranks have issued different collectives.
    """
    activations: dict[TensorKey, Any] = {} if recorded is None else recorded
    log.is_in_pass, log.num_before, first = True, len(log.issued), len(activations)
    try:
        with _logged(model, log, phase, micro_batch, activations):
            yield
    finally:
        keys = list(activations)[first:]
        log.gradients = tuple(key for key in keys if key.phase == "backward")
    log.is_in_pass = False
    log.meet(where)


@contextmanager
def _logged(
    model: nn.Module, log: CollectiveLog, phase: Phase, micro_batch: int, activations: dict[TensorKey, Any]
) -> Iterator[None]:
    running: list[str] = [""]

    @eager
    def enter(name: str, module: nn.Module, args: Any) -> None:
        running.append(name)

    @eager
    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if running[-1] == name:
            running.pop()

    if any(map(is_compiled, model.modules())):  # torch compiles nothing where a dispatch mode is active
        yield
        return
    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name)))
        handles.append(module.register_forward_hook(partial(leave, name), always_call=True))

    def record(name: str, group: dist.ProcessGroup | None, bypasses_autograd: bool) -> None:
        ranks = () if group is None else tuple(dist.get_process_group_ranks(group))
        log.groups[ranks] = group  # the last one that was used: a library may make its own of the same ranks
        position, after = len(activations), next(reversed(activations), None)
        log.issued.append(Collective(running[-1], name, ranks, phase, micro_batch, position, bypasses_autograd, after))

    try:
        with _CollectiveLog(record):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _CollectiveLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator and logs the collectives."""

    def __init__(self, log: Callable[[str, dist.ProcessGroup | None, bool], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, FakeTensor) for kind in types):  # DTensor computes shapes with them; nothing is sent
            return func(*args, **(kwargs or {}))
        if any(issubclass(kind, torch.Tensor) and kind not in _PLAIN for kind in types):
            return NotImplemented
        name = _NAMES.get(func.overloadpacket.__name__.rstrip("_")) if func.namespace in _NAMESPACES else None
        if name is not None:
            self._log(name, _group(args), func.namespace == "c10d" and _would_have_gradients(args))
        return func(*args, **(kwargs or {}))


_PLAIN = (torch.Tensor, nn.Parameter)


def _would_have_gradients(args: Any) -> bool:
    """Return whether numbers are sent while gradients are on, as they are not inside of an autograd function."""
    return torch.is_grad_enabled() and any(tensor.is_floating_point() for _, tensor in named_tensors(args))


def _group(args: Any) -> dist.ProcessGroup | None:
    """Return the group among an operator's arguments; None where that is unknown."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and str(arg._type()).endswith(".ProcessGroup"):
            return dist.ProcessGroup.unbox(arg)
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    names = [arg for arg in args if isinstance(arg, str)]  # functional collectives name their group last
    try:
        group: dist.ProcessGroup | None = resolve(names[-1]) if names else None
    except (RuntimeError, ValueError):
        return None
    return group
