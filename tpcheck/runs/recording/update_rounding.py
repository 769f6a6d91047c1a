"""How far rounding moves a parameter in one step of its optimizer: the step is taken on copies."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from inspect import unwrap
from math import sqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from tpcheck.numerics.optimizer_view import Part
from tpcheck.runs.recording.passes import Key, local_values

# Draws of what rounding does to a gradient. Where an optimizer divides by roots of small numbers, as Adam does, a few
# elements whose gradient is smaller than its rounding move by a whole step, or do not: one draw may miss them all.
NUM_DRAWS = 4
# A tensor of which more than this share is zero has zeros by its structure, such as rows of tokens that do not occur.
STRUCTURAL_ZEROS = 0.25


def lies_in(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Return whether the memory of `part` begins in that of `whole`."""
    start = local_values(whole).data_ptr()
    return bool(part.numel() and start <= part.data_ptr() < start + max(local_values(whole).nbytes, 1))


def moves_of_update(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    parameter: torch.Tensor,
    parts: Sequence[Part],
    deviations: Mapping[Key, Sequence[float]],
    drift: Mapping[Key, Sequence[float]],
    factor_rounding: float,
    seed: int,
) -> dict[Key, float]:
    """Return how far rounding moves what one parameter becomes in the optimizer's next step.

    The step is taken on copies: as it is, and several times with rounding in the gradient, then in the state.

    Args:
        optimizer, group, parameter: What is stepped: a parameter, or a flat partition of many.
        parts: The gradients of named parameters in the memory of its gradient.
        deviations: How far each gradient moves.
        drift: How far each state may have moved before the step.
        factor_rounding: Relative rounding of a factor that all gradients were multiplied by; 0 without one.
        seed: Of the rounding.

    Returns:
        Frobenius norms, by the key of each part's weight and states.
    """
    generator = torch.Generator(parameter.device).manual_seed(seed)
    exact = _step_copy(optimizer, group, parameter, parts, generator)
    given = {part.name: deviations.get(("gradient", part.name, "", 0), (0.0,))[0] for part in parts}
    noises: tuple[tuple[Mapping[str, float], Mapping[Key, Sequence[float]]], ...] = ((given, {}), ({}, drift))
    moves: dict[Key, float] = dict.fromkeys(exact, 0.0)
    for gradient_noise, state_noise in noises:
        draws = [
            _step_copy(
                optimizer, group, parameter, parts, generator, gradient_noise=gradient_noise, state_noise=state_noise
            )
            for _ in range(NUM_DRAWS)
        ]
        for key, expected in exact.items():
            moves[key] += max(float(torch.linalg.vector_norm((draw[key] - expected).double())) for draw in draws)
    if factor_rounding:
        scaled = _step_copy(optimizer, group, parameter, parts, generator, factor=1 + factor_rounding)
        for key, expected in exact.items():
            moves[key] += float(torch.linalg.vector_norm((scaled[key] - expected).double()))
    for key, expected in exact.items():
        if key[0] == "weight":
            moves[key] += torch.finfo(expected.dtype).eps / 2 * float(torch.linalg.vector_norm(expected.double()))
    return moves


def _step_copy(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    parameter: torch.Tensor,
    parts: Sequence[Part],
    generator: torch.Generator,
    *,
    gradient_noise: Mapping[str, float] = MappingProxyType({}),
    state_noise: Mapping[Key, Sequence[float]] = MappingProxyType({}),
    factor: float = 1.0,
) -> dict[Key, torch.Tensor]:
    """Take the optimizer's step on a copy of one parameter and return the new values of each part and its states."""
    assert parameter.grad is not None
    twin = nn.Parameter(parameter.detach().clone())
    gradient = parameter.grad.detach() * factor
    state = copy.deepcopy(dict(optimizer.state.get(parameter, {})))
    slices = {part.name: _slice_in(part.values, parameter.grad) for part in parts}
    shapes = {part.name: part.values.shape for part in parts}
    for name, at in slices.items():
        if gradient_noise.get(name):
            given = _flat(gradient)[at].view(shapes[name])
            given += noise(given, gradient_noise[name], generator, like_nonzero=True)
        for key, value in state.items():
            amount = state_noise.get(("state", name, key, 0), (0.0,))[0]
            where = _where_in_state(value, at, parameter, parts)
            if amount and where is not None:
                of_part = _flat(value)[where]
                of_part = of_part.view(shapes[name] if value.shape == parameter.shape else value.shape)
                is_positive = bool((of_part >= 0).all())
                of_part += noise(of_part, amount, generator, like_nonzero=True)
                if is_positive:
                    of_part.abs_()
    twin.grad = gradient
    clone = copy.copy(optimizer)
    clone.param_groups = [{**group, "params": [twin]}]
    clone.state = defaultdict(dict, {twin: state} if state else {})
    clone._optimizer_step_pre_hooks, clone._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    with torch.no_grad():
        unwrap(type(optimizer).step)(clone)
    result: dict[Key, torch.Tensor] = {}
    for name, at in slices.items():
        result[("weight", name, "", 0)] = _flat(twin.detach())[at]
        for key, value in clone.state[twin].items():
            where = _where_in_state(value, at, parameter, parts)
            if where is not None:
                result[("state", name, key, 0)] = _flat(value.detach())[where]
    return result


def _where_in_state(value: Any, at: slice, parameter: torch.Tensor, parts: Sequence[Part]) -> slice | None:
    """Return where a state is that of one part; None where it is no tensor of its elements, or of more than this part.

    Adafactor keeps sums over rows and columns: of a parameter of its own, those are its state.
    """
    if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim()):
        return None
    if value.shape == parameter.shape:
        return at
    is_alone = len(parts) == 1 and at == slice(0, local_values(parameter).numel())
    return slice(None) if is_alone and not hasattr(value, "placements") else None


def noise(tensor: torch.Tensor, norm: float, generator: torch.Generator, *, like_nonzero: bool = False) -> torch.Tensor:
    """Return uniform noise of about this Frobenius norm.

    Args:
        like_nonzero: None where the tensor is zero by its structure: in rows of zeros, and where many elements are 0.
    """
    uniform = torch.rand(tensor.shape, dtype=torch.float64, device=tensor.device, generator=generator) * 2 - 1
    number = tensor.numel()
    if like_nonzero and number:
        nonzero = tensor != 0
        if tensor.dim() >= 2:
            nonzero = nonzero.any(-1, keepdim=True).expand_as(tensor)
        elif float(nonzero.double().mean()) >= 1 - STRUCTURAL_ZEROS:
            nonzero = torch.ones_like(nonzero)
        uniform *= nonzero
        number = int(nonzero.sum())
    return (uniform * (norm * sqrt(3 / max(number, 1)))).to(tensor.dtype)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    local = local_values(tensor)
    return local.view(-1) if local.is_contiguous() else local.as_strided((local.numel(),), (1,))


def _slice_in(part: torch.Tensor, whole: torch.Tensor) -> slice:
    local = local_values(whole)
    first = (part.data_ptr() - local.data_ptr()) // local.element_size()
    return slice(first, first + part.numel())
