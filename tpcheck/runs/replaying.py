"""Cuts what a model computes in a training loop into calls, and replays these under perturbed rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tpcheck.backends.local_part import local_part
from tpcheck.core.errors import UsageError
from tpcheck.numerics.differences import frobenius, frobenius_distance
from tpcheck.numerics.evidence import Step, TensorKey
from tpcheck.numerics.perturb import Deviations, Perturbation, first_nonzero, named_deviations, perturbed_replay
from tpcheck.numerics.recorder import ModuleRecorder
from tpcheck.numerics.tensors import (
    State,
    copy_buffers,
    copy_parameters,
    map_tensors,
    named_tensors,
    restore_buffers,
    restore_parameters,
)
from tpcheck.numerics.tolerance import NUM_REPLAYS, largest_deviations

_LOSS = TensorKey("forward", "", 0, "output", "loss")
_SMALL = 20_000_000  # parameters: below it, threads that wait for one another cost more than they save


@contextmanager
def few_threads(num_parameters: int) -> Iterator[None]:
    """Compute on one thread inside, for a small model."""
    before = torch.get_num_threads()
    if num_parameters < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True)
class Call:
    """One call of the model, and what followed it until the next.

    Attributes:
        args, kwargs: Copies of its arguments.
        generator: State of the CPU's generator before it.
        parameters, buffers: The model's state before it.
        activations, gradients: What the call and its backward pass made.
        weights: Parameters before the next call; empty if they are the same.
        buffers_after: Buffers before the next call.
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
        loss = self.activations.get(_LOSS)
        return Step(
            activations=self.activations,
            gradients=gradients,
            weights=self.weights,
            gradient_norm=None,
            loss=0.0 if loss is None or loss.numel() != 1 else float(loss),
            buffers=self.buffers_after,
        )


class CallRecorder:
    """Records every call of `model`, and the backward pass and optimizer step after it, while inside the context."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self._model = model
        self._stack = ExitStack()

    def __enter__(self) -> CallRecorder:
        begin = self._model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        self._stack.callback(begin.remove)
        self._recorder = self._stack.enter_context(ModuleRecorder(self._model, self._keep))
        self._stack.enter_context(_gradient_hooks(self._model, self._keep_gradient))
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
                args=map_tensors(_copy, args),
                kwargs=map_tensors(_copy, kwargs),
                generator=torch.get_rng_state(),
                parameters=copy_parameters(self._model),
                buffers=copy_buffers(self._model),
            )
        )

    def _end(self) -> None:
        if self.calls:
            last = self.calls[-1]
            weights = copy_parameters(self._model)
            moved = any(not torch.equal(tensor, last.parameters[name]) for name, tensor in weights.items())
            last.weights = weights if moved else {}
            last.buffers_after = copy_buffers(self._model)

    def _keep(self, key: TensorKey, tensor: torch.Tensor) -> None:
        if self.calls:
            self.calls[-1].activations[key] = local_part(tensor).clone()

    def _keep_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self.calls:
            _add(self.calls[-1].gradients, name, gradient)


@contextmanager
def _gradient_hooks(model: nn.Module, receive: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Pass every gradient that reaches a parameter inside to `receive`, before it is accumulated."""
    handles = [
        parameter.register_hook(partial(receive, name))  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(gradients: dict[str, torch.Tensor], name: str, gradient: torch.Tensor) -> None:
    local = local_part(gradient.detach())
    gradients[name] = gradients[name] + local if name in gradients else local.clone()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def measure_deviations(model: nn.Module, calls: Sequence[Call]) -> Deviations:
    """Return how far each tensor of each call moves under perturbed rounding; the model is restored.

    The optimizer is not replayed: a weight's update is assumed to move as much, relatively, as its gradient.

    Raises:
        UsageError: The model does not compute the same each time from the same inputs and weights.
    """
    with _restored(model), few_threads(sum(parameter.numel() for parameter in model.parameters())):
        dtype = next(model.parameters()).dtype
        unperturbed = _replay(model, calls, Perturbation.of_replay(0, dtype, seed=0))
        if (moved := first_nonzero(unperturbed)) is not None:
            raise UsageError(
                "model", moved, "a model that computes the same each time: switch dropout off, or call model.eval()"
            )
        numbers = range(1, NUM_REPLAYS + 1)
        replays = [_replay(model, calls, Perturbation.of_replay(number, dtype, seed=0)) for number in numbers]
    return largest_deviations(replays)


def _replay(model: nn.Module, calls: Sequence[Call], perturbation: Perturbation) -> Deviations:
    deviations: Deviations = {}
    for index, call in enumerate(calls):
        restore_parameters(model, call.parameters)
        restore_buffers(model, call.buffers)
        torch.set_rng_state(call.generator)
        measured: Deviations = {(index, 0, key): inf for key in call.activations}  # until the replay makes the tensor
        gradients: dict[str, torch.Tensor] = {}
        with (
            perturbed_replay(model, perturbation, call.activations, measured, index, 0),
            _gradient_hooks(model, partial(_add, gradients)),
        ):
            _run(model, call)
        deviations |= measured
        loss = deviations.get((index, 0, _LOSS))
        if loss is not None:
            deviations[index, 0, "loss"] = loss
        deviations |= named_deviations(gradients, call.gradients, index, "gradient")
        deviations |= _weight_deviations(index, call, deviations)
    return deviations


def _run(model: nn.Module, call: Call) -> None:
    """Call the model, and run the backward pass from the recorded gradients of its outputs."""
    args, kwargs = map_tensors(_copy, call.args), map_tensors(_copy, call.kwargs)
    ends = [
        (tensor, call.activations[key])
        for path, tensor in named_tensors(model(*args, **kwargs))
        if (key := TensorKey("backward", "", 0, "output", path)) in call.activations and tensor.requires_grad
    ]
    if ends:
        torch.autograd.backward([tensor for tensor, _ in ends], [gradient for _, gradient in ends])


def _weight_deviations(index: int, call: Call, deviations: Deviations) -> Deviations:
    """Return how far updated weights move: the size of the update, times how far the gradient moves relatively."""
    moved: Deviations = {}
    for name, gradient in call.gradients.items():
        distance = deviations.get((index, "gradient", name))
        if distance is not None and name in call.weights:
            update, size = frobenius_distance(call.weights[name], call.parameters[name]), frobenius(gradient)
            moved[index, "weight", name] = update * min(1.0, distance / size) if size else update
    return moved


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore parameters, gradients, buffers and the generator when the context ends."""
    parameters, buffers, generator = copy_parameters(model), copy_buffers(model), torch.get_rng_state()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        restore_parameters(model, parameters)
        restore_buffers(model, buffers)
        torch.set_rng_state(generator)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
