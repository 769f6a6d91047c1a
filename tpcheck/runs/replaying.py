"""Cuts what a model does in a loop of the user's own into steps, and replays them under perturbed rounding."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tpcheck.core.errors import UsageError
from tpcheck.numerics.differences import frobenius, frobenius_distance
from tpcheck.numerics.evidence import Step, TensorKey
from tpcheck.numerics.perturb import perturbed_leaves
from tpcheck.numerics.recorder import ModuleRecorder
from tpcheck.numerics.snapshots import State, buffers_of, set_buffers, set_parameters
from tpcheck.numerics.tensors import map_tensors, named_tensors
from tpcheck.numerics.tolerance import NUM_REPLAYS, largest_deviations

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


Deviations = Mapping[Hashable, float]


def deviations_of(model: nn.Module, calls: Sequence[Call]) -> Deviations:
    """Return how far each tensor of each call moves under perturbed rounding; the model is left as it was.

    What an optimizer makes of gradients is not replayed: a weight's update is taken to move as much, relatively, as
    its gradient.

    Raises:
        UsageError: The model does not compute the same each time from the same inputs and weights.
    """
    with _left_as_it_is(model), few_threads(sum(parameter.numel() for parameter in model.parameters())):
        eps = torch.finfo(next(model.parameters()).dtype).eps
        still = _replayed(model, calls, eps=0.0, seed=0)
        moved = next((key for key, deviation in still.items() if deviation), None)
        if moved is not None:
            raise UsageError(
                "model",
                str(moved),
                "a model that computes the same each time: switch dropout off, or call model.eval()",
            )
        replays = [_replayed(model, calls, eps=eps, seed=seed) for seed in range(1, NUM_REPLAYS + 1)]
    return largest_deviations(replays)


def _replayed(model: nn.Module, calls: Sequence[Call], *, eps: float, seed: int) -> Deviations:
    deviations: dict[Hashable, float] = {}
    noise = torch.Generator().manual_seed(seed)
    for index, call in enumerate(calls):
        set_parameters(model, call.parameters)
        set_buffers(model, call.buffers)
        torch.set_rng_state(call.generator)
        deviations.update(_measured(index, call, *_replayed_call(model, call, eps, noise)))
    return deviations


def _replayed_call(
    model: nn.Module, call: Call, eps: float, noise: torch.Generator
) -> tuple[dict[TensorKey, torch.Tensor], dict[str, torch.Tensor]]:
    """Return activations and gradients of parameters."""
    activations: dict[TensorKey, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}

    def keep(key: TensorKey, tensor: torch.Tensor) -> None:
        activations[key] = tensor.clone()

    with (
        _gradients_into(model, gradients),
        perturbed_leaves(model, eps=eps, generator=noise),
        ModuleRecorder(model, keep),
    ):
        _run(model, call)
    return activations, gradients


def _run(model: nn.Module, call: Call) -> None:
    """Call the model, and send the recorded gradients of its outputs back through it."""
    fresh = [map_tensors(torch.clone, value) for value in (call.args, call.kwargs)]
    output = model(*fresh[0], **fresh[1])
    ends = [
        (tensor, call.activations[key])
        for path, tensor in named_tensors(output)
        if (key := TensorKey("backward", "", 0, "output", path)) in call.activations and tensor.requires_grad
    ]
    if ends:
        torch.autograd.backward([tensor for tensor, _ in ends], [gradient for _, gradient in ends])


def _measured(
    index: int, call: Call, activations: Mapping[TensorKey, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> Iterator[tuple[Hashable, float]]:
    for key, expected in call.activations.items():
        actual = activations.get(key)
        yield (index, 0, key), float("inf") if actual is None else frobenius_distance(actual, expected)
    loss = TensorKey("forward", "", 0, "output", "loss")
    if loss in activations and loss in call.activations:
        yield (index, 0, "loss"), frobenius_distance(activations[loss], call.activations[loss])
    for name, expected in call.gradients.items():
        if name in gradients:
            moved = frobenius_distance(gradients[name], expected)
            yield (index, "gradient", name), moved
            if name in call.weights:
                size = frobenius(expected)
                step = frobenius_distance(call.weights[name], call.parameters[name])
                yield (index, "weight", name), step * min(1.0, moved / size) if size else step


@contextmanager
def _gradients_into(model: nn.Module, gradients: dict[str, torch.Tensor]) -> Iterator[None]:
    def keep(name: str, gradient: torch.Tensor) -> None:
        gradients[name] = gradients[name] + gradient if name in gradients else gradient.detach().clone()

    handles = [
        parameter.register_hook(partial(keep, name))  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Put parameters, gradients, buffers and the generator back."""
    parameters, buffers, generator = local_parameters(model), buffers_of(model), torch.get_rng_state()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        set_parameters(model, parameters)
        set_buffers(model, buffers)
        torch.set_rng_state(generator)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
