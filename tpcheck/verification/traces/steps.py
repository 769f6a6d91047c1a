"""Cuts what a model does in a loop of the user's own into steps: one for each call of the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tpcheck.collect import ModuleRecorder
from tpcheck.collect.tree import map_tensors
from tpcheck.records import Step, TensorKey
from tpcheck.verification.state import State, buffers_of


@dataclass(slots=True)
class Call:
    """One call of the model, and what came of it until the next.

    Attributes:
        args, kwargs: What it was given, copied.
        generator: State of the CPU's generator before it.
        parameters, buffers: Before it.
        step: What is recorded; its weights are those before the next call, empty where the same.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generator: torch.Tensor
    parameters: State
    buffers: State
    activations: dict[TensorKey, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: State = field(default_factory=dict)
    buffers_after: State = field(default_factory=dict)

    def step(self) -> Step:
        gradients: Mapping[str, Any] = {name: self.gradients.get(name) for name in self.parameters}
        loss = self.activations.get(TensorKey("forward", "", 0, "output", "loss"))
        return Step(
            activations=self.activations,
            gradients=gradients,
            weights=self.weights,
            gradient_norm=None,
            loss=0.0 if loss is None or loss.numel() != 1 else float(loss),
            buffers=self.buffers_after,
        )


class CallRecorder:
    """Records every call of `model` and the backward pass and optimizer step behind it, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self._model = model
        self._stack = ExitStack()

    def __enter__(self) -> CallRecorder:
        begin = self._model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        self._stack.callback(begin.remove)
        self._recorder = self._stack.enter_context(ModuleRecorder(self._model, self._keep))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                handle = parameter.register_hook(partial(self._keep_gradient, name))  # type: ignore[no-untyped-call]
                self._stack.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        self._stack.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end()
        self._recorder.restart()
        self.calls.append(
            Call(
                args=map_tensors(_copied, args),
                kwargs=map_tensors(_copied, kwargs),
                generator=torch.get_rng_state(),
                parameters=local_parameters(self._model),
                buffers=buffers_of(self._model),
            )
        )

    def _end(self) -> None:
        if self.calls:
            last = self.calls[-1]
            weights = local_parameters(self._model)
            moved = any(not torch.equal(tensor, last.parameters[name]) for name, tensor in weights.items())
            last.weights = weights if moved else {}
            last.buffers_after = buffers_of(self._model)

    def _keep(self, key: TensorKey, tensor: torch.Tensor) -> None:
        if self.calls:
            self.calls[-1].activations[key] = local(tensor).clone()

    def _keep_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self.calls:
            before = self.calls[-1].gradients.get(name)
            own = local(gradient.detach()).clone()
            self.calls[-1].gradients[name] = own if before is None else before + own


def local_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the parameters, of DTensors the local shard."""
    return {name: local(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def local(tensor: Any) -> torch.Tensor:
    """Return what this rank holds of a tensor."""
    held: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()
