"""Replays recorded calls of a whole model under perturbed rounding: forward, and backward from the same gradients."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from tpcheck.collect import ModuleRecorder, perturbed_leaves
from tpcheck.collect.tree import map_tensors, named_tensors
from tpcheck.compare import frobenius, frobenius_distance
from tpcheck.errors import UsageError
from tpcheck.records import TensorKey
from tpcheck.tolerance import NUM_REPLAYS, largest_deviations
from tpcheck.verification.state import buffers_of, set_buffers, set_parameters
from tpcheck.verification.traces.steps import Call, local_parameters
from tpcheck.verification.traces.threads import few_threads

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
