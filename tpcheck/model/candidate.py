"""Shards the model on this rank, trains it, and records every tensor that is compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tpcheck.backends.interface import (
    Backend,
    Candidate,
    RankLike,
    ScalesLosses,
    SumsLosses,
    TrainingOptions,
    TrainsByItself,
)
from tpcheck.backends.layout import Layout
from tpcheck.backends.local_part import full_tensor, local_part
from tpcheck.core.digests import digest
from tpcheck.core.errors import BackendError
from tpcheck.core.guides import Guide
from tpcheck.model.blame import blame_backend
from tpcheck.model.build import Batch, copy_batch, find_loss
from tpcheck.model.implementations import compile_module, compiled_modules, replace_implementations
from tpcheck.model.optimizer_state import candidate_state
from tpcheck.model.user_code import CUSTOM
from tpcheck.numerics.evidence import LOGGED_NORM, Phase, Step, TensorKey
from tpcheck.numerics.precision import reduced_precision_raised
from tpcheck.numerics.recorder import CollectiveLog, ModuleRecorder, is_compiled, logged_collectives
from tpcheck.numerics.tensors import copy_buffers


@dataclass(frozen=True, slots=True)
class CandidateStart:
    """One rank's sharded model before the first step.

    Attributes:
        weights: This rank's shard of each parameter, and of each whose tie the backend has dissolved.
        digests: Digests of parameters and buffers.
        layouts: How each parameter lies over the TP group.
        group_ranks: The live groups that this rank uses, by axis.
        lost: Names of the reference's parameters whose values the sharded model holds under no name.
    """

    weights: Mapping[str, torch.Tensor]
    digests: Mapping[tuple[str, str], str]
    layouts: Mapping[str, Layout]
    group_ranks: Mapping[str, tuple[tuple[int, ...], ...]]
    lost: tuple[str, ...] = ()


def shard(
    backend: Backend, model: nn.Module, expected: Mapping[str, torch.Tensor], rank: RankLike, options: TrainingOptions
) -> tuple[Candidate, CandidateStart]:
    """Shard `model`; return the candidate and a copy of its parameters.

    Args:
        expected: The reference's parameters.

    Raises:
        BackendError: The backend crashed; with its own message, and a hint for a model that no library has rules for.
    """
    with blame_backend(backend, "sharding the model", hint_to_shard(model, backend.name, options.config)):
        ties = _ties(model)
        candidate = backend.shard(model, rank, options)
        replace_implementations(candidate.module, options)
        parameters = dict(candidate.module.named_parameters(remove_duplicate=False))
        untied = [
            name for name, first in ties.items() if name in parameters and parameters[name] is not parameters.get(first)
        ]
        weights = {name: candidate.parameter(name) for name in (*expected, *untied) if name in parameters}
        digests = _digests("parameter", weights) | _buffer_digests(candidate.module)
        lost = lost_parameters(candidate, parameters, expected, rank.topology.tp)
        start = CandidateStart(weights, digests, candidate.layouts(), candidate.group_ranks(), lost)
        for module in compiled_modules(candidate.module, options).values():
            compile_module(module)
        return candidate, start


_LIBRARIES = ("transformers", "peft", "megatron")
_OWN_MODEL = (
    "{} is no model of transformers, peft or megatron, for which there are rules. Shard it by a function of your own: "
    f"shard(model, rank) beside build and --backend {CUSTOM}, or shard= in Python.\nread on: {Guide.OWN_MODEL.url}"
)


def hint_to_shard(model: nn.Module, backend: str, config: Mapping[str, Any]) -> str:
    """Return how to shard a model that no library has rules for; nothing where the user gives a function or a plan."""
    has_rules = is_of_library(model) or backend == CUSTOM or bool(config.get("plan"))
    return "" if has_rules else _OWN_MODEL.format(type(model).__name__)


def is_of_library(model: nn.Module) -> bool:
    """Return whether a model is one of a library's, for which backends have rules."""
    return any(base.__module__.partition(".")[0] in _LIBRARIES for base in type(model).__mro__)


_SEQUENCE = 4
"""Elements in a row that are looked for together: four of bfloat16 are equal by chance once in 2**32 or so."""


def lost_parameters(
    candidate: Candidate, names: Collection[str], expected: Mapping[str, torch.Tensor], tp: int
) -> tuple[str, ...]:
    """Return the reference's parameters whose values the sharded model holds under no name.

    A layer may rename its parameters, or fuse them: a parameter is there where at least half of a rank's share of its
    sequences of elements is among those of the parameters with new names.
    """
    missing = [name for name in expected if name not in names]
    if not missing:
        return ()
    renamed = [_sequences(candidate.parameter(name)) for name in names if name not in expected]
    present = torch.cat(renamed) if renamed else torch.empty(0, dtype=torch.int64)
    lost = []
    for name in missing:
        sequences = _sequences(expected[name])
        if int(torch.isin(sequences, present).sum()) * 2 * tp < len(sequences):
            lost.append(name)
    return tuple(lost)


def _sequences(tensor: torch.Tensor) -> torch.Tensor:
    """Return a number for each sequence of elements along the last dim, and along the first one (transposed)."""
    tensor = tensor.detach().cpu()
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
    found = []
    for rows in (matrix, matrix.t()) if tensor.dim() > 1 else (matrix,):
        bits = rows.contiguous().double().view(torch.int64)  # exact for every dtype of weights
        length = min(_SEQUENCE, bits.shape[1])
        hashed = torch.zeros_like(bits[:, : bits.shape[1] - length + 1])
        for offset in range(length):  # wraps around, as hashes do
            hashed = hashed * 1_000_003 + bits[:, offset : bits.shape[1] - length + 1 + offset]
        found.append(hashed.reshape(-1))
    return torch.cat(found)


def _ties(model: nn.Module) -> dict[str, str]:
    """Return the other names of parameters that have several, each with the parameter's first name."""
    names_by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
    return {name: first for first, *others in names_by_id.values() for name in others}


def train(
    backend: Backend,
    candidate: Candidate,
    names: Sequence[str],
    batches: Sequence[Sequence[Batch]],
    log: CollectiveLog,
) -> tuple[Step, ...]:
    """Train on this DP rank's batches, batches[step][micro_batch]; return copies of every tensor that is compared.

    Args:
        names: Of parameters.
        log: Grows by every collective of every step, which a crash leaves there.

    Raises:
        BackendError: The backend crashed; with its own message and where it happened.
    """
    with closing(StepRecorder(backend, candidate, names, log)) as recorder:
        if isinstance(candidate, TrainsByItself):
            with blame_backend(backend, "training"):
                candidate.train(recorder)
        else:
            for micro_batches in batches:
                _step(backend, candidate, micro_batches, recorder)
    return tuple(recorder.steps)


def loss_of_candidate(backend: Backend, output: Any, phase: str) -> torch.Tensor:
    """Return the loss that the sharded model returns.

    Raises:
        BackendError: There is none, as there is of the unsharded model, or it has no gradient.
    """
    if (loss := find_loss(output)) is not None:
        return loss
    what = "no loss" if find_loss(output, with_gradient=False) is None else "a loss without a gradient"
    raise BackendError(
        f"{backend.name}, {phase}: the sharded model returns {what} on this rank, and the unsharded one a loss with "
        "its gradient. Look for a detach(), torch.no_grad() or requires_grad=False in what the ranks do."
    )


def _step(backend: Backend, candidate: Candidate, micro_batches: Sequence[Batch], recorder: StepRecorder) -> None:
    for batch in micro_batches:
        with recorder.forward(batch):
            output = candidate.forward(copy_batch(batch))
        loss = loss_of_candidate(backend, output, f"forward of step {len(recorder.steps)}")
        with recorder.backward():
            candidate.backward(loss)
        recorder.add_loss(loss.detach() / len(micro_batches))
    recorder.gradients_are_ready()
    with recorder.optimizing():
        candidate.step()
    recorder.stepped()


class StepRecorder:
    """Records the steps of a candidate as they happen: a `StepObserver`.

    Attributes:
        steps: Those that have ended.
    """

    def __init__(self, backend: Backend, candidate: Candidate, names: Sequence[str], log: CollectiveLog) -> None:
        self.steps: list[Step] = []
        self._backend, self._candidate, self._names, self._log = backend, candidate, names, log
        self._begin()

    def _begin(self) -> None:
        """Forget what was recorded of the last step."""
        self._first_collective = len(self._log.issued)
        self._activations: dict[TensorKey, torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []
        self._gradients: dict[str, torch.Tensor | None] = {}
        self._loss_scale = 1.0
        self._hooks = ExitStack()
        self._recorder: ModuleRecorder | None = None
        self._num_forward = 0

    def close(self) -> None:
        """Remove the hooks that a step which crashed has left."""
        self._hooks.close()

    @contextmanager
    def forward(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Record the forward pass of the next micro-batch."""
        if self._recorder is None:
            self._recorder = self._hooks.enter_context(ModuleRecorder(self._candidate.module, self._keep))
        self._recorder.begin_micro_batch(self._num_forward)
        self._num_forward += 1
        with self._pass("forward"):
            yield

    def backward(self) -> AbstractContextManager[None]:
        """Record the backward pass of the last micro-batch."""
        return self._pass("backward")

    @contextmanager
    def _pass(self, phase: Phase) -> Iterator[None]:
        number, module = self._num_forward - 1, self._candidate.module
        where = f"{phase} of step {len(self.steps)}" + (f", micro-batch {number}" if number else "")
        with (
            blame_backend(self._backend, where, model=module),
            logged_collectives(
                module, self._log, phase, number, self._activations, where=f"{self._backend.name}, {where}"
            ),
        ):
            yield

    def _keep(self, key: TensorKey, tensor: torch.Tensor) -> None:
        local = local_part(tensor)
        if key.phase == "backward" and isinstance(self._candidate, SumsLosses):
            self._activations[key] = local / self._candidate.backward_factor()
        else:
            self._activations[key] = local.clone()

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add to the loss of the step."""
        self._losses.append(loss)

    @contextmanager
    def _blaming_step(self) -> Iterator[None]:
        with blame_backend(self._backend, f"step {len(self.steps)}"):
            yield
        self._log.meet(f"{self._backend.name}, step {len(self.steps)}")

    @contextmanager
    def optimizing(self) -> Iterator[None]:
        """Let the optimizer compute in full precision."""
        is_float64 = next(self._candidate.module.parameters()).dtype is torch.float64
        with self._blaming_step(), reduced_precision_raised(is_float64):
            yield

    def gradients_are_ready(self) -> None:
        """Copy the gradients, and record no module until the next step."""
        self._hooks.close()
        with self._blaming_step():
            self._gradients = {name: self._candidate.gradient(name) for name in self._names}
            if isinstance(self._candidate, ScalesLosses):
                self._loss_scale = self._candidate.loss_scale()

    def stepped(self) -> None:
        """Copy what the step has changed, and end it."""
        with self._blaming_step():
            weights = {name: self._candidate.parameter(name) for name in self._names}
            norm = self._candidate.gradient_norm()
            state = candidate_state(self._candidate, self._names)
        module = self._candidate.module
        present = {name: gradient for name, gradient in self._gradients.items() if gradient is not None}
        digests = _digests("gradient", present) | _digests("parameter", weights) | _buffer_digests(module)
        step = Step(
            self._activations,
            self._gradients,
            weights,
            norm,
            sum(float(full_tensor(loss)) for loss in self._losses),
            buffers=copy_buffers(module),
            optimizer_state=state,
            digests=digests,
            collectives=tuple(self._log.issued[self._first_collective :]),
            logs_collectives=not any(map(is_compiled, module.modules())),
            loss_scale=self._loss_scale,
            is_skipped=isinstance(self._candidate, ScalesLosses) and self._candidate.has_skipped(),
        )
        self.steps.append(step)
        self._begin()

    def logged(self, values: Mapping[str, float]) -> None:
        """Add what was logged of the last step; the norm, where the candidate knows none by itself."""
        last = self.steps[-1]
        norm = values.get(LOGGED_NORM) if last.gradient_norm is None else last.gradient_norm
        self.steps[-1] = replace(last, logged={**last.logged, **values}, gradient_norm=norm)


def _digests(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], str]:
    return {(kind, name): digest(tensor) for name, tensor in tensors.items()}


def _buffer_digests(module: nn.Module) -> dict[tuple[str, str], str]:
    return _digests("buffer", {name: local_part(buffer) for name, buffer in module.named_buffers()})
