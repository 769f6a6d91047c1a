"""Trains the sharded model on this rank and records what it made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tpcheck.backends.interface import Backend, Candidate, RankLike, TrainingOptions
from tpcheck.backends.layout import Layout
from tpcheck.backends.local_part import full_tensor, local_part
from tpcheck.core.digests import digest
from tpcheck.core.errors import BackendError, TpcheckError
from tpcheck.model.batches import Batch, copied
from tpcheck.model.build import loss_of
from tpcheck.numerics.evidence import Step, TensorKey
from tpcheck.numerics.recorder import ModuleRecorder, logged_collectives
from tpcheck.numerics.snapshots import buffers_of


@dataclass(frozen=True, slots=True)
class CandidateStart:
    """What one rank's sharded model is before the first step.

    Attributes:
        weights: This rank's shard of each parameter, and of each that is tied with one in the reference alone.
        digests: Digests of parameters and buffers.
        layouts: How each parameter lies over the TP group.
        group_ranks: The live groups that this rank uses, by axis.
    """

    weights: Mapping[str, torch.Tensor]
    digests: Mapping[tuple[str, str], str]
    layouts: Mapping[str, Layout]
    group_ranks: Mapping[str, tuple[tuple[int, ...], ...]]


def sharded(
    backend: Backend, model: nn.Module, names: Sequence[str], rank: RankLike, options: TrainingOptions
) -> tuple[Candidate, CandidateStart]:
    """Shard `model`; return what trains, and a copy of what it starts from.

    Args:
        names: Names of the reference's parameters.

    Raises:
        BackendError: The backend crashed; with its own message.
    """
    with blamed_on(backend, "sharding the model"):
        ties = _ties(model)
        candidate = backend.shard(model, rank, options)
        known = dict(candidate.module.named_parameters(remove_duplicate=False))
        untied = [name for name, first in ties.items() if name in known and known[name] is not known.get(first)]
        weights = {name: candidate.parameter(name) for name in (*names, *untied) if name in known}
        digests = _digests("parameter", weights) | _buffer_digests(candidate.module)
        return candidate, CandidateStart(weights, digests, candidate.layouts(), candidate.group_ranks())


def _ties(model: nn.Module) -> dict[str, str]:
    """Return the further names of parameters that have several, each with the first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: first for first, *rest in names.values() for name in rest}


def trained(backend: Backend, candidate: Candidate, names: Sequence[str], batches: Sequence[Batch]) -> tuple[Step, ...]:
    """Train on this DP rank's batches; return copies of everything that is compared.

    Raises:
        BackendError: The backend crashed; with its own message and where it happened.
    """
    return tuple(_step(backend, candidate, names, index, batch) for index, batch in enumerate(batches))


def _step(backend: Backend, candidate: Candidate, names: Sequence[str], index: int, batch: Batch) -> Step:
    activations: dict[TensorKey, torch.Tensor] = {}

    def keep(key: TensorKey, tensor: torch.Tensor) -> None:
        activations[key] = local_part(tensor).clone()

    with ModuleRecorder(candidate.module, keep):
        with blamed_on(backend, f"forward of step {index}"), logged_collectives(candidate.module) as collectives:
            output = candidate.forward(copied(batch))
        loss = loss_of(output)
        with blamed_on(backend, f"backward of step {index}"):
            candidate.backward(loss)
    with blamed_on(backend, f"step {index}"):
        gradients = {name: candidate.gradient(name) for name in names}
        candidate.step()
        weights = {name: candidate.parameter(name) for name in names}
        norm = candidate.gradient_norm()
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    digests = _digests("gradient", present) | _digests("parameter", weights) | _buffer_digests(candidate.module)
    return Step(
        activations,
        gradients,
        weights,
        norm,
        float(full_tensor(loss.detach())),
        buffers=buffers_of(candidate.module),
        digests=digests,
        collectives=tuple(collectives),
    )


def _digests(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], str]:
    return {(kind, name): digest(tensor) for name, tensor in tensors.items()}


def _buffer_digests(module: nn.Module) -> dict[tuple[str, str], str]:
    return _digests("buffer", {name: local_part(buffer) for name, buffer in module.named_buffers()})


@contextmanager
def blamed_on(backend: Backend, phase: str) -> Iterator[None]:
    """Turn what is raised inside into a BackendError that says what the backend was doing."""
    try:
        yield
    except TpcheckError:
        raise
    except Exception as error:
        raise BackendError(f"{backend.name}, {phase}: {type(error).__name__}: {error}") from error
