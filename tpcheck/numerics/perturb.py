"""Replays a model under random rounding (Monte Carlo arithmetic at leaf modules) and measures how far tensors move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import xxhash
from torch import nn

from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import TensorKey
from tpcheck.numerics.precision import torch_function_disabled
from tpcheck.numerics.recorder import ForcedValue, ModuleRecorder, eager
from tpcheck.numerics.tensors import map_tensors
from tpcheck.numerics.tolerance import MAGNIFICATION

Deviations = dict[Hashable, float]  # Frobenius distance of each tensor in a replay from the recorded one


@dataclass(frozen=True, slots=True)
class Perturbation:
    """The random rounding of one replay.

    Attributes:
        eps: Relative size: the machine epsilon of the dtype that is used, or 0.
        generator: Source of the randomness; equal states give equal replays.
        magnification: By how much it is larger than rounding; negative for the opposite of another's.
    """

    eps: float
    generator: torch.Generator
    magnification: float = 1.0

    @classmethod
    def of_replay(cls, number: int, dtype: torch.dtype, seed: int) -> Perturbation:
        """Return the perturbation of a replay by its number; replay 0 is not perturbed.

        In float32 the last four of eight are magnified, each second one the opposite of the one before.
        """
        eps, magnification = torch.finfo(dtype).eps if number else 0.0, 1.0
        if dtype is torch.float32 and number and (number - 1) % 8 >= 4:
            magnification = MAGNIFICATION if number % 2 else -MAGNIFICATION
            number -= number % 2 == 0
        return cls(eps, torch.Generator().manual_seed(seed * 1000 + number), magnification)

    def factor(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        """Return what to multiply the output of a module, or its gradient, with. It depends on the draws before."""
        return random_factor(tensor, self.magnification * self.eps, self.generator)

    def of_rounding(self, deviations: Deviations) -> Deviations:
        """Return how far rounding moves what the replay has moved so far."""
        return {key: deviation / abs(self.magnification) for key, deviation in deviations.items()}


@dataclass(frozen=True, slots=True)
class KeyedPerturbation:
    """The random rounding of one replay on several ranks: equal for equal places, whatever a rank draws elsewhere.

    So the copies of a replicated tensor stay equal, also where ranks hold shards of different sizes. The relative size
    is the machine epsilon of each tensor's own dtype.

    Attributes:
        seed: Equal seeds give equal replays.
        magnification: As of `Perturbation`, for tensors in float32.
    """

    seed: int
    magnification: float = 1.0

    def factor(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        """Return what to multiply the output of a module, or its gradient, with."""
        eps = torch.finfo(tensor.dtype).eps * (self.magnification if tensor.dtype is torch.float32 else 1.0)
        return random_factor(tensor, eps, self.generator(place, tensor.device))

    def generator(self, place: str, device: torch.device) -> torch.Generator:
        """Return a generator for a place: a module with the number of its call, or a parameter."""
        seed = xxhash.xxh3_64_intdigest(place.encode(), seed=self.seed & (1 << 63) - 1)
        return torch.Generator(device).manual_seed(seed >> 1)


@contextmanager
def perturbed_replay(
    model: nn.Module,
    perturbation: Perturbation,
    expected: Mapping[TensorKey, torch.Tensor],
    deviations: Deviations,
    *key_prefix: int,
    forced: ForcedValue | None = None,
    micro_batch: int = 0,
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

    recorder = ModuleRecorder(model, measure, forced)
    recorder.begin_micro_batch(micro_batch)
    with perturbed_leaves(model, perturbation), recorder:
        yield


def named_deviations(
    actual: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor | None], *key_prefix: Hashable
) -> Deviations:
    """Return how far tensors of the same names are apart, by (*key_prefix, name); without those that one side lacks."""
    present = [name for name in expected if expected[name] is not None and actual.get(name) is not None]
    return {(*key_prefix, name): frobenius_distance(actual[name], expected[name]) for name in present}  # type: ignore[arg-type]


def first_nonzero(deviations: Deviations) -> tuple[Hashable, ...] | None:
    """Return the key of the first tensor of the earliest step with a deviation; None where all are 0."""
    keys = [key for key, deviation in deviations.items() if deviation and isinstance(key, tuple)]
    return min(keys, key=lambda key: key[0], default=None)


class _Rounding(Protocol):
    def factor(self, tensor: torch.Tensor, place: str) -> torch.Tensor: ...


@contextmanager
def perturbed_leaves(model: nn.Module, perturbation: _Rounding) -> Iterator[None]:
    """Perturb the output of every leaf module of `model`, forward and backward, while inside."""
    calls: Counter[str] = Counter()

    @eager
    def perturb(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        place = f"{name} call {calls[name]}"
        calls[name] += 1
        return map_tensors(lambda tensor: _perturbed(tensor, perturbation, place), output)

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(partial(perturb, name)) for name, leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _perturbed(tensor: torch.Tensor, perturbation: _Rounding, place: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    result: torch.Tensor = _Perturb.apply(tensor, perturbation, place)  # type: ignore[no-untyped-call]
    return result


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, perturbation: _Rounding, place: str) -> torch.Tensor:
        ctx.perturbation, ctx.place = perturbation, place
        return _multiplied(tensor, perturbation, place)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _multiplied(grads[0], ctx.perturbation, f"gradient of {ctx.place}"), None, None


def _multiplied(tensor: torch.Tensor, perturbation: _Rounding, place: str) -> torch.Tensor:
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor * perturbation.factor(tensor, place)
    from torch.distributed.tensor import DTensor

    local = tensor._local_tensor  # type: ignore[attr-defined]
    return DTensor.from_local(
        local * perturbation.factor(local, place),
        tensor.device_mesh,  # type: ignore[attr-defined]
        placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def random_factor(tensor: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
    """Return 1 + eps * U(-1, 1) for each element of `tensor`."""
    with torch_function_disabled():
        uniform = torch.rand(tensor.shape, dtype=torch.float64, device=generator.device, generator=generator)
        # exact up to the last addition, since eps is a power of two
        return uniform.mul_(2 * eps).add_(1 - eps).to(device=tensor.device, dtype=tensor.dtype)
