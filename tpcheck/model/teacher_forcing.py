"""Teacher forcing per module: every module is given the reference's tensors, so that its own error is seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import nan
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tpcheck.backends.interface import Backend, Candidate, RankLike
from tpcheck.backends.local_part import local_part
from tpcheck.model.blame import blame_backend
from tpcheck.model.build import Batch, copy_batch, find_loss
from tpcheck.model.reference import CommunicatingRank, Reference, ReferenceStep, loss_times_factor
from tpcheck.numerics.differences import distance_of_terms, frobenius, frobenius_distance
from tpcheck.numerics.evidence import Collective, Step, TensorKey
from tpcheck.numerics.perturb import Deviations, Perturbation, named_deviations, perturbed_replay
from tpcheck.numerics.recorder import CollectiveLog, ModuleRecorder, logged_collectives
from tpcheck.numerics.tensors import map_tensors, restore_buffers, state_restored
from tpcheck.numerics.tolerance import Tolerance

Activations = Mapping[TensorKey, torch.Tensor]
Gradients = Mapping[str, torch.Tensor]

# If a tensor's relative distance from the reference's is larger than this, its error is more than a small one, or it
# is not cut as its shape suggests: the module keeps it. The limit is lower for gradients: in an uneven cut of fused
# blocks, read as an even one, most elements agree.
_LARGEST_ERROR = {"forward": 0.5, "backward": 0.2}
# A smaller distance is the rounding of one module; a rank's term of a sum is further off, if only in some features.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class ReferenceParts:
    """One rank's parts of the reference's tensors, which its modules are given.

    Attributes:
        expected: The reference's tensors.
        tp, tp_rank: Size of the TP group, and this rank's place in it.
        partial_gradients: Gradients of which each rank has a term of a sum, which no part can replace; None if unknown.
    """

    expected: Activations
    tp: int = 1
    tp_rank: int = 0
    partial_gradients: Collection[TensorKey] | None = ()

    def forced_value(self, key: TensorKey, actual: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the reference's tensor; `actual` itself where no part of it is close.

        The reference's only call of a module stands for a second one, too: activation checkpointing recomputes it.
        """
        expected = self.expected.get(key, self.expected.get(replace(key, call=0)) if key.call == 1 else None)
        if expected is None or any(placement.is_partial() for placement in getattr(actual, "placements", ())):
            return actual
        local = local_part(actual)
        part = _even_part(expected, tuple(local.shape), self.tp, self.tp_rank)
        if part is None or not frobenius_distance(local, part) <= self._largest_error(key) * frobenius(part):
            return actual
        forced = actual.detach().clone()  # a DTensor where `actual` is one
        local_part(forced).copy_(part)
        return forced

    def _largest_error(self, key: TensorKey) -> float:
        if key.phase == "backward" and self.partial_gradients is None:
            return _ROUNDING
        is_partial = self.partial_gradients is not None and key in self.partial_gradients
        return 0.0 if is_partial else _LARGEST_ERROR[key.phase]


def _even_part(expected: torch.Tensor, shape: tuple[int, ...], tp: int, tp_rank: int) -> torch.Tensor | None:
    """Return the whole tensor, or its even cut along the one dim in which the shapes differ; None for another shape."""
    if tuple(expected.shape) == shape:
        return expected
    cut = [dim for dim, size in enumerate(shape) if size != expected.shape[dim]] if len(shape) == expected.dim() else []
    if len(cut) != 1 or shape[cut[0]] * tp != expected.shape[cut[0]]:
        return None
    return expected.narrow(cut[0], tp_rank * shape[cut[0]], shape[cut[0]])


def find_partial_gradients(passes: Sequence[Activations], expected: Activations) -> frozenset[TensorKey]:
    """Return the gradients of outputs of which each rank has a term: their sum is right where none of them is.

    Args:
        passes: What each rank recorded where modules kept every gradient that is further off than rounding.
    """
    return frozenset(
        key
        for key, tensor in expected.items()
        if key.phase == "backward"
        and key.role == "output"
        and _are_terms([activations.get(key) for activations in passes], tensor)
    )


def _are_terms(parts: Sequence[torch.Tensor | None], expected: torch.Tensor) -> bool:
    full_size = [part for part in parts if part is not None and part.shape == expected.shape]
    if len(full_size) < max(2, len(parts)):
        return False
    as_replicas = max(frobenius_distance(part, expected) for part in full_size)
    return as_replicas > _ROUNDING * frobenius(expected) and distance_of_terms(full_size, expected) < as_replicas / 2


@dataclass(frozen=True, slots=True)
class ForcedPass:
    """One rank's pass with teacher forcing.

    Attributes:
        step: What the neighbours gave each module (inputs, gradients of outputs) and what it returned. Gradients of
            parameters are those of this rank's backward pass, before anything is reduced; there may be none.
        forced: What modules were given from the reference in place of that.
    """

    step: Step
    forced: frozenset[TensorKey]


def forced_modules(
    backend: Backend,
    candidate: Candidate,
    batch: Batch,
    first: ReferenceStep,
    rank: RankLike,
    partial_gradients: Collection[TensorKey] | None = None,
    *,
    share: float = 1.0,
    log: CollectiveLog,
) -> ForcedPass:
    """Run every module of the sharded model on its part of the reference's tensors, forward and backward.

    Collective. Weights, their gradients, buffers and generators stay as they are.

    Args:
        first: The reference's first step.
        partial_gradients: Gradients of which each rank has a term: modules keep those. If None, these are unknown:
            modules keep every gradient that is further off than rounding.
        share: What the loss of a micro-batch is multiplied by before its backward pass.
        log: Grows by every collective, which a crash leaves there.

    Raises:
        BackendError: The backend crashed; with its own message.
    """
    place = rank.topology.coordinate(rank.rank)
    parts = ReferenceParts(first[place["dp"]].activations, rank.topology.tp, place["tp"], partial_gradients)
    activations: dict[TensorKey, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor | None] = {}
    forced_inputs: set[TensorKey] = set()
    where = "a pass with teacher forcing per module"
    first_collective = len(log.issued)

    def forced(key: TensorKey, actual: torch.Tensor) -> torch.Tensor:
        value = parts.forced_value(key, actual)
        if value is not actual:
            forced_inputs.add(key)
        return value

    def keep(key: TensorKey, tensor: torch.Tensor) -> None:
        activations[key] = local_part(tensor).clone()

    def keep_gradients(by_name: Gradients) -> None:
        local = {name: local_part(gradient).clone() for name, gradient in by_name.items()}
        gradients.update(_unscaled(local, first[0].loss_scale))

    try:
        with (
            blame_backend(backend, where, model=candidate.module),
            logged_collectives(candidate.module, log, recorded=activations, where=f"{backend.name}, {where}"),
            state_restored(candidate.module),
            ModuleRecorder(candidate.module, keep, forced),
            inner_backward(candidate.module, _share_of_loss(share * first[0].loss_scale), keep_gradients),
        ):
            candidate.forward(copy_batch(batch))
    finally:  # a pass that fails is explained by it, too
        log.issued[first_collective:] = map(_in_its_phase, log.issued[first_collective:])
    collectives = tuple(log.issued[first_collective:])
    step = Step(activations, gradients, weights={}, gradient_norm=None, loss=nan, collectives=collectives)
    return ForcedPass(step, frozenset(forced_inputs))


def _in_its_phase(collective: Collective) -> Collective:
    """Return a collective of a pass whose backward pass runs inside the forward of the model."""
    is_backward = collective.after is not None and collective.after.phase == "backward"
    return replace(collective, phase="backward", module="") if is_backward else collective


def forced_tolerance(reference: Reference, rank: CommunicatingRank, first: ReferenceStep) -> Tolerance:
    """Measure the tolerance of the first step's pass with teacher forcing per module. Collective."""
    share = reference.first_share

    def replay(perturbation: Perturbation) -> Deviations:
        reference.restore()
        deviations: Deviations = {}
        batches = [micro_batches[0] for micro_batches in reference.batches[0]]
        for dp_rank, (batch, step) in enumerate(zip(batches, first, strict=True)):
            restore_buffers(reference.model, reference.buffers)
            expected = step.activations
            forced = ReferenceParts(expected).forced_value

            def measure_gradients(by_name: Gradients, step: Step = step, dp_rank: int = dp_rank) -> None:
                gradients = _unscaled(by_name, step.loss_scale)
                deviations.update(named_deviations(gradients, replica_gradients(step), 0, dp_rank, "gradient"))

            with (
                reference.weighing.applied(reference.model, batch, 0, dp_rank, 0) as weighed,
                perturbed_replay(reference.model, perturbation, expected, deviations, 0, dp_rank, forced=forced),
                inner_backward(reference.model, _share_of_loss(share * step.loss_scale), measure_gradients),
            ):
                reference.model(**copy_batch(weighed))
        return deviations

    return reference.measure(rank, replay)


def replica_gradients(step: Step) -> Mapping[str, torch.Tensor | None]:
    """Return the gradients from the batch of this DP rank alone, from its first micro-batch where it has several."""
    if step.micro_gradients:
        return step.micro_gradients[0].local
    return step.local_gradients or step.gradients


def _share_of_loss(share: float) -> Callable[[Any], torch.Tensor | None]:
    """Return what finds the loss of a micro-batch, multiplied by its share as in the reference's step."""

    def find_share(output: Any) -> torch.Tensor | None:
        loss = find_loss(output)
        return None if loss is None else loss_times_factor(loss, share)

    return find_share


def _unscaled(gradients: Gradients, scale: float) -> Gradients:
    return gradients if scale == 1 else {name: gradient.float() / scale for name, gradient in gradients.items()}


_NOT_CHECKPOINTED = "compatible with .grad()"  # of torch's reentrant checkpointing, in any version, and DeepSpeed's


@contextmanager
def inner_backward(
    model: nn.Module, find_loss: Callable[[Any], torch.Tensor | None], receive: Callable[[Gradients], None]
) -> Iterator[None]:
    """Run the backward pass of each call of `model` when its forward pass ends, and pass on the parameters' gradients.

    Autograd is on in the model alone: engines and wrappers around it, which would wait for a backward pass that they
    start, see outputs without gradients. Nothing is accumulated, and hooks on accumulation are not called: `receive` is
    called once for a call, with the gradients of this rank's backward pass alone. It is not called where `find_loss`
    finds no loss in what the model returns, or where the model allows no such pass: reentrant activation checkpointing,
    reversible layers.
    """

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        torch.set_grad_enabled(True)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        loss = find_loss(output)
        gradients = None if loss is None else _gradients(model, loss)
        torch.set_grad_enabled(False)
        if gradients is not None:
            receive(gradients)
        return map_tensors(torch.Tensor.detach, output)

    with torch.no_grad():
        handles = [model.register_forward_pre_hook(before, prepend=True), model.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _gradients(model: nn.Module, loss: torch.Tensor) -> Gradients | None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with patch.object(torch.autograd, "backward", side_effect=_AccumulatesError):
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    except _AccumulatesError:
        return None
    except RuntimeError as error:
        if _NOT_CHECKPOINTED in str(error):
            return None
        raise
    return {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


class _AccumulatesError(Exception):
    """A layer runs another backward pass inside the backward pass, which accumulates gradients."""
