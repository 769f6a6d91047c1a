"""One more pass in which every module is fed what the reference's was: rounding of one module at a time.

At a low precision the noise of all modules before hides which of them is wrong. Where each starts from the inputs, and
backward from the output gradients, that the reference's starts from, only its own rounding is left, and an error stays
where it is made.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan

import torch
from torch import nn

from tpcheck.adapters import Backend, Candidate
from tpcheck.adapters.protocols import RankLike
from tpcheck.collect import ModuleRecorder, perturbed_leaves
from tpcheck.collect.inner_backward import Gradients, inner_backward
from tpcheck.collect.isolation import isolated_modules
from tpcheck.collect.local import own_part
from tpcheck.compare import frobenius_distance
from tpcheck.records import Step, TensorKey
from tpcheck.verification.batches import Batch, copied
from tpcheck.verification.candidate import blamed_on
from tpcheck.verification.isolated_parts import Activations, Parts
from tpcheck.verification.loss import found_loss
from tpcheck.verification.reference import ReferenceStep
from tpcheck.verification.replay import Deviations
from tpcheck.verification.state import State, set_buffers, set_parameters, untouched


@dataclass(frozen=True, slots=True)
class IsolatedPass:
    """What one rank saw of modules that were run one by one.

    Attributes:
        step: What entered (inputs, gradients of outputs: as the neighbour gave it) and left every module. Gradients of
            parameters are those of this rank's backward pass, before anything is reduced; there may be none.
        fed: What entered modules from the reference, in the place of what the neighbour gave.
    """

    step: Step
    fed: frozenset[TensorKey]


def isolated_pass(
    backend: Backend,
    candidate: Candidate,
    batch: Batch,
    first: ReferenceStep,
    rank: RankLike,
    terms: Collection[TensorKey] | None = None,
) -> IsolatedPass:
    """Run every module of the sharded model on its part of what the reference's was fed, forward and backward.

    Collective. Weights, their gradients, buffers and generators stay as they are.

    Args:
        first: What the reference made of the first step.
        terms: Gradients of which each rank has a term: modules keep those. None where it is not known which they are:
            modules keep every gradient that is further off than rounding.

    Raises:
        BackendError: The backend crashed; with its own message.
    """
    place = rank.topology.coordinate(rank.rank)
    parts = Parts(first[place["dp"]].activations, rank.topology.tp, place["tp"], terms)
    activations: dict[TensorKey, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor | None] = {}
    fed: set[TensorKey] = set()

    def instead_of(key: TensorKey, actual: torch.Tensor) -> torch.Tensor:
        part = parts.instead_of(key, actual)
        if part is not actual:
            fed.add(key)
        return part

    def keep(key: TensorKey, tensor: torch.Tensor) -> None:
        activations[key] = own_part(tensor).clone()

    def take(made: Gradients) -> None:
        gradients.update({name: own_part(gradient).clone() for name, gradient in made.items()})

    with (
        blamed_on(backend, "a pass of isolated modules"),
        untouched(candidate.module),
        ModuleRecorder(candidate.module, keep),
        isolated_modules(candidate.module, instead_of),
        inner_backward(candidate.module, found_loss, take),
    ):
        candidate.forward(copied(batch))
    return IsolatedPass(Step(activations, gradients, weights={}, gradient_norm=None, loss=nan), frozenset(fed))


def isolated_deviations(
    model: nn.Module,
    start: tuple[State, State],
    batches: Sequence[Batch],
    first: ReferenceStep,
    *,
    eps: float,
    seed: int,
) -> Deviations:
    """Run the first step's passes of each DP rank anew from `start`, each module fed what it was fed before.

    Leaf modules are perturbed by `eps`; every tensor is measured.
    """
    parameters, buffers = start
    set_parameters(model, parameters)
    generator = torch.Generator().manual_seed(seed)
    deviations: dict[Hashable, float] = {}
    for dp_rank, (batch, recorded) in enumerate(zip(batches, first, strict=True)):
        set_buffers(model, buffers)
        with (
            perturbed_leaves(model, eps=eps, generator=generator),
            ModuleRecorder(model, partial(_measure, deviations, dp_rank, recorded.activations)),
            isolated_modules(model, Parts(recorded.activations).instead_of),
            inner_backward(
                model, found_loss, partial(_measure_gradients, deviations, dp_rank, gradients_alone(recorded))
            ),
        ):
            model(**copied(batch))
    return deviations


def gradients_alone(step: Step) -> Mapping[str, torch.Tensor | None]:
    """Return the gradients that the batch of one DP rank alone makes."""
    return step.own_gradients or step.gradients


def _measure(
    deviations: dict[Hashable, float], dp_rank: int, recorded: Activations, key: TensorKey, tensor: torch.Tensor
) -> None:
    if key in recorded:
        deviations[0, dp_rank, key] = frobenius_distance(tensor, recorded[key])


def _measure_gradients(
    deviations: dict[Hashable, float], dp_rank: int, expected: Mapping[str, torch.Tensor | None], made: Gradients
) -> None:
    for name, gradient in made.items():
        if (whole := expected.get(name)) is not None:
            deviations[0, dp_rank, "gradient", name] = frobenius_distance(gradient, whole)
