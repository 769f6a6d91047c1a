"""One more forward pass in which every module is fed the reference's inputs: rounding of one module at a time.

At a low precision the noise of all modules before hides which of them is wrong. Where each starts from what the
reference's starts from, only its own rounding is left, and an error stays where it is made.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from math import nan

import torch
from torch import nn

from tpcheck.adapters import Backend, Candidate
from tpcheck.adapters.protocols import RankLike
from tpcheck.collect import ModuleRecorder, perturbed_leaves
from tpcheck.collect.isolation import Replacement, isolated_modules
from tpcheck.collect.local import own_part
from tpcheck.compare import frobenius, frobenius_distance
from tpcheck.records import Step, TensorKey
from tpcheck.verification.batches import Batch, copied
from tpcheck.verification.candidate import blamed_on
from tpcheck.verification.reference import ReferenceStep
from tpcheck.verification.replay import Deviations
from tpcheck.verification.state import State, set_buffers, set_parameters, untouched

Activations = Mapping[TensorKey, torch.Tensor]

# A tensor that is further than this from what should be there, relative to it, is wrong by more than rounding, or cut
# in a way that its shape does not tell: the module keeps it.
_ALIKE = 0.5


def isolated_pass(backend: Backend, candidate: Candidate, batch: Batch, first: ReferenceStep, rank: RankLike) -> Step:
    """Return what enters and leaves every module of the sharded model, each fed its part of the reference's inputs.

    What enters is recorded as the caller gave it. Collective; weights, buffers and generators stay as they are.

    Args:
        first: What the reference made of the first step.

    Raises:
        BackendError: The backend crashed; with its own message.
    """
    place = rank.topology.coordinate(rank.rank)
    expected = first[place["dp"]].activations
    activations: dict[TensorKey, torch.Tensor] = {}

    def keep(key: TensorKey, tensor: torch.Tensor) -> None:
        activations[key] = own_part(tensor).clone()

    with (
        blamed_on(backend, "forward of isolated modules"),
        untouched(candidate.module),
        ModuleRecorder(candidate.module, keep),
        isolated_modules(candidate.module, _parts_of(expected, rank.topology.tp, place["tp"])),
    ):
        candidate.forward(copied(batch))
    return Step(activations, gradients={}, weights={}, gradient_norm=None, loss=nan)


def isolated_deviations(
    model: nn.Module,
    start: tuple[State, State],
    batches: Sequence[Batch],
    expected: Sequence[Activations],
    *,
    eps: float,
    seed: int,
) -> Deviations:
    """Run the first step's forward pass of each DP rank anew from `start`, each module fed its own inputs of before.

    Leaf modules are perturbed by `eps`; every tensor is measured.
    """
    parameters, buffers = start
    set_parameters(model, parameters)
    generator = torch.Generator().manual_seed(seed)
    deviations: dict[Hashable, float] = {}
    for dp_rank, (batch, recorded) in enumerate(zip(batches, expected, strict=True)):
        set_buffers(model, buffers)
        with (
            torch.no_grad(),
            perturbed_leaves(model, eps=eps, generator=generator),
            ModuleRecorder(model, partial(_measure, deviations, dp_rank, recorded)),
            isolated_modules(model, _parts_of(recorded, 1, 0)),
        ):
            model(**copied(batch))
    return deviations


def _measure(
    deviations: dict[Hashable, float], dp_rank: int, recorded: Activations, key: TensorKey, tensor: torch.Tensor
) -> None:
    if key in recorded:
        deviations[0, dp_rank, key] = frobenius_distance(tensor, recorded[key])


def _parts_of(expected: Activations, tp: int, tp_rank: int) -> Replacement:
    """Return what gives a module this rank's part of what the reference's was given, where that can be told."""

    def replacement(key: TensorKey, actual: torch.Tensor) -> torch.Tensor:
        whole = expected.get(key)
        if whole is None or any(placement.is_partial() for placement in getattr(actual, "placements", ())):
            return actual
        own = own_part(actual)
        part = _part(whole, tuple(own.shape), tp, tp_rank)
        if part is None or not frobenius_distance(own, part) <= _ALIKE * frobenius(part):
            return actual
        return _filled_like(actual, part)

    return replacement


def _part(whole: torch.Tensor, shape: tuple[int, ...], tp: int, tp_rank: int) -> torch.Tensor | None:
    """Return the whole, or its even cut along the one dim in which the shapes differ; None for anything else."""
    if tuple(whole.shape) == shape:
        return whole
    cut = [dim for dim, size in enumerate(shape) if size != whole.shape[dim]] if len(shape) == whole.dim() else []
    if len(cut) != 1 or shape[cut[0]] * tp != whole.shape[cut[0]]:
        return None
    return whole.narrow(cut[0], tp_rank * shape[cut[0]], shape[cut[0]])


def _filled_like(actual: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the kind of `actual`, a DTensor, too, that holds `part` on this rank."""
    filled = actual.detach().clone()
    own_part(filled).copy_(part)
    return filled
