"""Records what goes into and comes out of every module, forward and backward, by hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tpcheck.collect.tree import map_tensors, named_tensors
from tpcheck.records.trace import Phase, Role, TensorKey

Sink = Callable[[TensorKey, torch.Tensor], None]


class ModuleRecorder:
    """Hands every floating-point tensor that enters or leaves a module to `sink`, in the order of events.

    Each module is given views of its inputs, so that the gradient of an input is what this module alone sends back,
    whoever else uses the tensor; its caller gets copies of its outputs, which it may change in place without undoing
    the hooks. Gradients are handed over as autograd computes them: the order of backward events is that of the
    backward pass. A tensor is handed over as it is: a sink that keeps it must copy it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> seen = []
        >>> with ModuleRecorder(model, lambda key, tensor: seen.append(str(key))):
        ...     _ = model(torch.ones(1, 2))
        >>> seen
        ['model: input 0', '0: input 0', '0: output 0', 'model: output 0']
    """

    def __init__(self, model: nn.Module, sink: Sink) -> None:
        self._model = model
        self._sink = sink
        self._calls: Counter[str] = Counter()
        self._open: dict[str, list[int]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> ModuleRecorder:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after(name)))
        return self

    def restart(self) -> None:
        """Count the calls of every module from zero again."""
        self._calls.clear()
        self._open.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, name: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            call = self._calls[name]
            self._calls[name] += 1
            self._open.setdefault(name, []).append(call)
            args, kwargs = map_tensors(_view, args), map_tensors(_view, kwargs)
            self._record(name, call, "input", (*args, kwargs) if kwargs else args)
            return args, kwargs

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            calls = self._open.get(name)
            if not calls:  # a backend called the hook without its pre-hook
                return output
            output = map_tensors(_copy, output)
            self._record(name, calls.pop(), "output", output)
            return output

        return hook

    def _record(self, name: str, call: int, role: Role, value: Any) -> None:
        for path, tensor in named_tensors(value):
            if not tensor.is_floating_point():
                continue
            self._sink(_key("forward", name, call, role, path), tensor.detach())
            if _has_gradient(tensor):  # without autograd, a hook would see what goes to whoever else uses the tensor
                backward = _key("backward", name, call, role, path)
                hook = self._gradient_hook(backward)
                self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]

    def _gradient_hook(self, key: TensorKey) -> Callable[[torch.Tensor], None]:
        return lambda gradient: self._sink(key, gradient.detach())


def _view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view_as(tensor) if _has_gradient(tensor) else tensor


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if _has_gradient(tensor) else tensor


def _has_gradient(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and tensor.is_floating_point() and torch.is_grad_enabled()


def _key(phase: Phase, module: str, call: int, role: Role, path: str) -> TensorKey:
    return TensorKey(phase=phase, module=module, call=call, role=role, path=path)
