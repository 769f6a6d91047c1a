"""Replays a model under random rounding (Monte Carlo arithmetic at leaf modules) and measures how far tensors move."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import TensorKey
from tpcheck.numerics.precision import torch_function_disabled
from tpcheck.numerics.recorder import ForcedValue, ModuleRecorder
from tpcheck.numerics.tensors import map_tensors

Deviations = dict[Hashable, float]  # Frobenius distance of each tensor in a replay from the recorded one


@dataclass(frozen=True, slots=True)
class Perturbation:
    """The random rounding of one replay.

    Attributes:
        eps: Relative size: the machine epsilon of the dtype that is used, or 0.
        generator: Source of the randomness; equal states give equal replays.
    """

    eps: float
    generator: torch.Generator

    @classmethod
    def of_replay(cls, number: int, dtype: torch.dtype, seed: int) -> Perturbation:
        """Return the perturbation of a replay by its number; replay 0 is not perturbed."""
        return cls(torch.finfo(dtype).eps if number else 0.0, torch.Generator().manual_seed(seed * 1000 + number))


@contextmanager
def perturbed_replay(
    model: nn.Module,
    perturbation: Perturbation,
    expected: Mapping[TensorKey, torch.Tensor],
    deviations: Deviations,
    *key_prefix: int,
    forced: ForcedValue | None = None,
) -> Iterator[None]:
    """Perturb every leaf module, and measure how far each recorded tensor of a module moves, while inside.

    Args:
        expected: The recorded tensors. Other tensors of the replay are ignored.
        deviations: Receives the distances, by (*key_prefix, key).
        forced: As in `ModuleRecorder`.
    """

    def measure(key: TensorKey, tensor: torch.Tensor) -> None:
        if key in expected:
            with torch_function_disabled():
                distance = frobenius_distance(tensor, expected[key])
            deviations.update({(*key_prefix, key): distance})

    with perturbed_leaves(model, perturbation), ModuleRecorder(model, measure, forced):
        yield


def named_deviations(
    actual: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor | None], *key_prefix: Hashable
) -> Deviations:
    """Return how far tensors of the same names are apart, by (*key_prefix, name); without those that one side lacks."""
    present = [name for name in expected if expected[name] is not None and actual.get(name) is not None]
    return {(*key_prefix, name): frobenius_distance(actual[name], expected[name]) for name in present}  # type: ignore[arg-type]


def first_nonzero(deviations: Deviations) -> str | None:
    """Return the name of the first tensor with a deviation; None where all are 0."""
    for key, deviation in deviations.items():
        if deviation:
            return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
    return None


@contextmanager
def perturbed_leaves(model: nn.Module, perturbation: Perturbation) -> Iterator[None]:
    """Perturb the output of every leaf module of `model`, forward and backward, while inside."""

    def perturb_tensor(tensor: torch.Tensor) -> Any:
        return _Perturb.apply(tensor, perturbation) if tensor.is_floating_point() else tensor  # type: ignore[no-untyped-call]

    def perturb(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return map_tensors(perturb_tensor, output)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(perturb) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, perturbation: Perturbation) -> torch.Tensor:
        ctx.perturbation = perturbation
        return tensor * _factor(tensor, perturbation)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * _factor(grads[0], ctx.perturbation), None


def _factor(tensor: torch.Tensor, perturbation: Perturbation) -> torch.Tensor:
    eps, generator = perturbation.eps, perturbation.generator
    with torch_function_disabled():
        uniform = torch.rand(tensor.shape, dtype=torch.float64, device=generator.device, generator=generator)
        return (1 + eps * (2 * uniform - 1)).to(device=tensor.device, dtype=tensor.dtype)
