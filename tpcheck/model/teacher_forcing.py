"""Passes in which every module is given what the reference's was: rounding, and mistakes, of one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan

import torch
from torch import nn
from torch.func import functional_call

from tpcheck.backends.interface import Backend, Candidate, RankLike
from tpcheck.backends.local_part import local_part
from tpcheck.model.batches import Batch, copied
from tpcheck.model.build import found_loss
from tpcheck.model.candidate import blamed_on
from tpcheck.model.reference import Deviations, ReferenceStep
from tpcheck.numerics.differences import distance_of_terms, frobenius, frobenius_distance, place, rounding_error
from tpcheck.numerics.evidence import Evidence, Step, TensorKey
from tpcheck.numerics.perturb import nothing_raised, perturbed_leaves
from tpcheck.numerics.recorder import ModuleRecorder
from tpcheck.numerics.snapshots import State, set_buffers, set_parameters, untouched
from tpcheck.numerics.teacher_forcing import Gradients, inner_backward, isolated_modules

Activations = Mapping[TensorKey, torch.Tensor]

# A tensor that is further than this from what should be there, relative to it, is wrong by more than a small mistake,
# or cut in a way that its shape does not tell: the module keeps it. Gradients are of fused blocks, too, most of which
# may lie where an uneven reading has them.
_ALIKE = {"forward": 0.5, "backward": 0.2}
# Closer than this is rounding, of one module at a time; a term of a sum is further off, if only in some features.
_ROUNDED = 0.05


@dataclass(frozen=True, slots=True)
class Parts:
    """One rank's parts of the reference's tensors.

    Attributes:
        expected: The reference's tensors.
        terms: Gradients of which each rank has a term, which no part can stand for; None where nobody knows which.
    """

    expected: Activations
    tp: int = 1
    tp_rank: int = 0
    terms: Collection[TensorKey] | None = ()

    def instead_of(self, key: TensorKey, actual: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of what should be there; what is there where no part of it is alike.

        The reference's only call of a module stands for a second one, too: activation checkpointing computes it again.
        """
        whole = self.expected.get(key, self.expected.get(replace(key, call=0)) if key.call == 1 else None)
        if whole is None or any(placement.is_partial() for placement in getattr(actual, "placements", ())):
            return actual
        own = local_part(actual)
        part = _part(whole, tuple(own.shape), self.tp, self.tp_rank)
        if part is None or not frobenius_distance(own, part) <= self._alike(key) * frobenius(part):
            return actual
        return _filled_like(actual, part)

    def _alike(self, key: TensorKey) -> float:
        if key.phase == "backward" and self.terms is None:
            return _ROUNDED
        return 0.0 if self.terms is not None and key in self.terms else _ALIKE[key.phase]


def terms_among(passes: Sequence[Activations], expected: Activations) -> frozenset[TensorKey]:
    """Return the gradients of outputs of which each rank has a term: they add up to what none of them is.

    Args:
        passes: What each rank recorded where modules kept every gradient that is further off than rounding.
    """
    return frozenset(
        key
        for key, whole in expected.items()
        if key.phase == "backward" and key.role == "output" and _are_terms([one.get(key) for one in passes], whole)
    )


def _are_terms(parts: Sequence[torch.Tensor | None], whole: torch.Tensor) -> bool:
    known = [part for part in parts if part is not None and part.shape == whole.shape]
    if len(known) < max(2, len(parts)):
        return False
    as_whole = max(frobenius_distance(part, whole) for part in known)
    return as_whole > _ROUNDED * frobenius(whole) and distance_of_terms(known, whole) < as_whole / 2


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
    local_part(filled).copy_(part)
    return filled


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
        activations[key] = local_part(tensor).clone()

    def take(made: Gradients) -> None:
        gradients.update({name: local_part(gradient).clone() for name, gradient in made.items()})

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
    return step.local_gradients or step.gradients


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


_ROUNDINGS = 10.0  # a part may round otherwise than in the whole

Remake = Callable[[torch.Tensor], torch.Tensor]


def remade(model: nn.Module, state: State, evidence: Evidence) -> dict[TensorKey, tuple[torch.Tensor, ...]]:
    """Return what leaf modules should have made of the ranks' inputs in the first step, where those were wrong.

    By output, one tensor for each tp_rank. Without modules that are given more than one tensor, or that do not work on
    a rank's part as on the whole.

    Args:
        state: Parameters and buffers of `model` before the first step.
    """
    made: dict[TensorKey, tuple[torch.Tensor, ...]] = {}
    with nothing_raised():
        wrong = list(_wrong_inputs(evidence))
    with torch.no_grad():
        for key, given in wrong:
            output = TensorKey("forward", key.module, key.call, "output", "0")
            remake = None if _is_cut(key.module, evidence) else _remake_of(model, key.module, state)
            if remake is not None and _works_by_parts(remake, evidence, key, output, given):
                made[output] = tuple(remake(part) for part in given)
    return made


def _wrong_inputs(evidence: Evidence) -> Iterator[tuple[TensorKey, Sequence[torch.Tensor]]]:
    """Yield the only inputs of modules that differ from the reference's on some rank, with what each rank gave."""
    first = evidence.reference[0].activations
    inputs: dict[tuple[str, int], list[TensorKey]] = {}
    for key in first:
        if (key.phase, key.role) == ("forward", "input"):
            inputs.setdefault((key.module, key.call), []).append(key)
    for key, *others in inputs.values():
        given = [one.activations.get(key) for one in evidence.candidate[0]]
        parts = [part for part in given if part is not None]
        if others or key.path != "0" or len(parts) < len(given):
            continue
        placed = place(first[key].shape, parts)
        allowed = evidence.tolerance.allowed((0, evidence.dp_rank, key), rounding_error(first[key]))
        if placed is not None and any(
            frobenius_distance(part, placed.expected_part(first[key], tp_rank)) > allowed
            for tp_rank, part in enumerate(parts)
        ):
            yield key, parts


def _is_cut(name: str, evidence: Evidence) -> bool:
    """Return whether a rank holds a shard alone of one of a module's own parameters."""
    return any(not layout.is_replicated for path, layout in evidence.layouts.items() if path.rpartition(".")[0] == name)


def _remake_of(model: nn.Module, name: str, state: State) -> Remake | None:
    """Return what runs a leaf module of the reference as it was at the start."""
    module = dict(model.named_modules()).get(name)
    if module is None or next(module.children(), None) is not None:
        return None
    prefix = f"{name}." if name else ""
    own = {path.removeprefix(prefix): tensor for path, tensor in state.items() if path.startswith(prefix)}

    def remake(given: torch.Tensor) -> torch.Tensor:
        made = functional_call(module, {path: tensor.clone() for path, tensor in own.items()}, (given,))
        return made if isinstance(made, torch.Tensor) else given.new_empty(0)

    return remake


def _works_by_parts(
    remake: Remake, evidence: Evidence, before: TensorKey, after: TensorKey, given: Sequence[torch.Tensor]
) -> bool:
    """Return whether parts of the reference's input give parts of its output."""
    first = evidence.reference[0].activations
    made = [one.activations.get(after) for one in evidence.candidate[0]]
    results = [part for part in made if part is not None]
    if after not in first or len(results) < len(made):
        return False
    entered, left = place(first[before].shape, given), place(first[after].shape, results)
    if entered is None or left is None:
        return False
    allowed = _ROUNDINGS * evidence.tolerance.allowed((0, evidence.dp_rank, after), rounding_error(first[after]))
    for tp_rank in range(len(results)):
        try:
            part = remake(entered.expected_part(first[before], tp_rank))
        except Exception:  # whatever a module says that wants the whole, or more than this tensor
            return False
        if not frobenius_distance(part, left.expected_part(first[after], tp_rank)) <= allowed:
            return False
    return True
