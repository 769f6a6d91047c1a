"""How far rounding moves a parameter in one step of its optimizer: the step is taken on copies."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from inspect import unwrap
from math import inf, sqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from tpcheck.numerics.optimizer_view import Part
from tpcheck.numerics.tolerance import LOCAL_FACTOR_OF_GRADIENTS, SAFETY_FACTOR, TYPICAL_NOISE
from tpcheck.runs.recording.passes import Key, local_values

# Draws of what rounding does to a gradient, and to states.
NUM_DRAWS = 4
# Adam's first step moves an element by its whole rate, whatever its gradient: one that is smaller than its rounding
# turns or does not, and ten times what that moves may be more than the whole step. So a draw rounds as much more as
# what is measured is multiplied with to be allowed, and is divided by it: what turns is allowed once. Weights of 16
# bits are judged in units of what rounding does to their neighbours, and allowed at least LEAST_FACTOR times it.
LEAST_FACTOR = TYPICAL_NOISE * LOCAL_FACTOR_OF_GRADIENTS
# Where few elements may turn, all draws may miss each: the two smallest, up to this many times their rounding, turn
# at once, and that is allowed twice, which four times as many do not exceed. Of many, draws turn more than a run does.
REACH_OF_TURNS = 2.5
MOST_TURNS = 2
ROOM_FOR_TURNS = 2.0
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
    low_precision: Collection[str],
    seed: int,
) -> dict[Key, float]:
    """Return how far rounding moves what one parameter becomes in the optimizer's next step.

    The step is taken on copies: as it is, and several times with rounding in the gradient, then in the state. Once
    more, with the smallest elements of the gradient turned.

    Args:
        optimizer, group, parameter: What is stepped: a parameter, or a flat partition of many.
        parts: The gradients of named parameters in the memory of its gradient.
        deviations: How far each gradient moves.
        drift: How far each state may have moved before the step.
        factor_rounding: Relative rounding of a factor that all gradients were multiplied by; 0 without one.
        low_precision: Names of parameters whose weights are of 16 bits.
        seed: Of the rounding.

    Returns:
        Frobenius norms, by the key of each part's weight, of its master (as if there were one) and of its states.
    """
    generator = torch.Generator(parameter.device).manual_seed(seed)
    step_copy = partial(_step_copy, optimizer, group, parameter, parts, generator)
    exact = step_copy()
    given = {part.name: deviations.get(("gradient", part.name, "", 0), (0.0,))[0] for part in parts}
    magnifications = (1.0, SAFETY_FACTOR) if low_precision else (SAFETY_FACTOR,)
    by_gradients = {factor: _moved_by_gradients(step_copy, exact, given, factor) for factor in magnifications}
    by_turns = _distances(step_copy(gradient_noise=given, turns_signs=True), exact)
    by_states = [_distances(step_copy(state_noise=drift), exact) for _ in range(NUM_DRAWS)]
    by_factor = _distances(step_copy(factor=1 + factor_rounding), exact) if factor_rounding else {}
    moves: dict[Key, float] = {}
    for key, expected in exact.items():
        kind, name, *_ = key
        others = max(draw[key] for draw in by_states) + by_factor.get(key, 0.0)
        if kind == "state":
            moves[key] = by_gradients[magnifications[0]][key] + others
            continue
        others += torch.finfo(expected.dtype).eps / 2 * float(torch.linalg.vector_norm(expected.double()))
        turned = ROOM_FOR_TURNS * by_turns[key]
        by_rounding = by_gradients[SAFETY_FACTOR][key], turned / SAFETY_FACTOR
        moves[("master", name, "", 0)] = max(by_rounding) + others
        if name in low_precision:
            by_rounding = by_gradients[1.0][key], turned / LEAST_FACTOR
        moves[key] = max(by_rounding) + others
    return moves


def _moved_by_gradients(
    step_copy: Callable[..., dict[Key, torch.Tensor]],
    exact: Mapping[Key, torch.Tensor],
    noise_of: Mapping[str, float],
    magnification: float,
) -> dict[Key, float]:
    """Return how far rounding of gradients moves what a step leaves at most, from draws that are magnified."""
    magnified = {name: magnification * amount for name, amount in noise_of.items()}
    draws = [_distances(step_copy(gradient_noise=magnified), exact) for _ in range(NUM_DRAWS)]
    return {key: max(draw[key] for draw in draws) / magnification for key in exact}


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
    turns_signs: bool = False,
) -> dict[Key, torch.Tensor]:
    """Take the optimizer's step on a copy of one parameter and return the new values of each part and its states.

    Args:
        turns_signs: The noise of a gradient is no draw: it turns the smallest elements.
    """
    assert parameter.grad is not None
    twin = nn.Parameter(parameter.detach().clone())
    gradient = parameter.grad.detach() * factor
    state = copy.deepcopy(dict(optimizer.state.get(parameter, {})))
    slices = {part.name: _slice_in(part.values, parameter.grad) for part in parts}
    shapes = {part.name: part.values.shape for part in parts}
    for name, at in slices.items():
        if gradient_noise.get(name):
            given = _flat(gradient)[at].view(shapes[name])
            if turns_signs:
                given += _turning(given, gradient_noise[name])
            else:
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


def _distances(values: Mapping[Key, torch.Tensor], others: Mapping[Key, torch.Tensor]) -> dict[Key, float]:
    return {key: float(torch.linalg.vector_norm((values[key] - other).double())) for key, other in others.items()}


def noise(tensor: torch.Tensor, norm: float, generator: torch.Generator, *, like_nonzero: bool = False) -> torch.Tensor:
    """Return uniform noise of about this Frobenius norm.

    Args:
        like_nonzero: None where the tensor is zero by its structure: in rows of zeros, and where many elements are 0.
    """
    uniform = torch.rand(tensor.shape, dtype=torch.float64, device=tensor.device, generator=generator) * 2 - 1
    number = tensor.numel()
    if like_nonzero and number:
        has_noise = _is_not_structural(tensor)
        uniform *= has_noise
        number = int(has_noise.sum())
    return (uniform * _largest_of_uniform(norm, number)).to(tensor.dtype)


def _turning(gradient: torch.Tensor, norm: float) -> torch.Tensor:
    """Return what turns the signs of the smallest elements that rounding of this Frobenius norm may turn, else 0."""
    may_be_noise = _is_not_structural(gradient).reshape(-1)
    largest = REACH_OF_TURNS * _largest_of_uniform(norm, int(may_be_noise.sum()))
    values = gradient.double().reshape(-1)
    sizes = torch.where(may_be_noise, values.abs(), inf)
    smallest = sizes.topk(min(MOST_TURNS, sizes.numel()), largest=False)
    may_turn = torch.zeros_like(may_be_noise)
    may_turn[smallest.indices] = smallest.values < largest
    beyond = torch.full_like(values, largest).where(values <= 0, -largest)
    return (beyond * may_turn).view(gradient.shape).to(gradient.dtype)


def _largest_of_uniform(norm: float, number: int) -> float:
    """Return up to where numbers are that are drawn uniformly around 0 and have about this Frobenius norm."""
    return norm * sqrt(3 / max(number, 1))


def _is_not_structural(tensor: torch.Tensor) -> torch.Tensor:
    """Return a mask of the elements that are not zero by the tensor's structure."""
    nonzero = tensor != 0
    if tensor.dim() >= 2:
        return nonzero.any(-1, keepdim=True).expand_as(tensor)
    return nonzero if float(nonzero.double().mean()) < 1 - STRUCTURAL_ZEROS else torch.ones_like(nonzero)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    local = local_values(tensor)
    return local.view(-1) if local.is_contiguous() else local.as_strided((local.numel(),), (1,))


def _slice_in(part: torch.Tensor, whole: torch.Tensor) -> slice:
    local = local_values(whole)
    first = (part.data_ptr() - local.data_ptr()) // local.element_size()
    return slice(first, first + part.numel())
