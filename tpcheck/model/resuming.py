"""Trains, saves, ends the world, goes on from what was saved in new processes, and compares with the training that was
not interrupted."""

from __future__ import annotations

import hashlib
import random
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpcheck.backends.interface import (
    STEPS_TAKEN,
    Backend,
    Candidate,
    ResumesByItself,
    ResumesTraining,
    TrainingOptions,
    WayToResume,
)
from tpcheck.backends.local_part import local_part
from tpcheck.backends.peft_models import is_peft_model
from tpcheck.backends.registry import load_backend
from tpcheck.core.check_names import RESUME_CHECK
from tpcheck.core.cuda import uses_cuda
from tpcheck.core.deepspeed_config import without_sizes
from tpcheck.core.digests import digest
from tpcheck.core.errors import BackendError, RankFailure
from tpcheck.core.findings import Finding
from tpcheck.core.generators import seed_everything
from tpcheck.core.phases import begin_phase
from tpcheck.core.topology import Topology
from tpcheck.families.settings import overlay
from tpcheck.model.blame import blame_backend
from tpcheck.model.build import Batch, batch_size, build_model, copy_batch, loss_of, moved_batch
from tpcheck.model.options import Request, RunOptions
from tpcheck.model.preload import preload_of
from tpcheck.model.rank_run import training_options
from tpcheck.model.reference import CommunicatingRank, Reference
from tpcheck.model.user_code import with_user_code
from tpcheck.numerics.checks.resume import (
    OF_GROUP,
    ResumedTraining,
    SavedTraining,
    compare_other_topology,
    compare_same_topology,
)
from tpcheck.numerics.evidence import WayOutcome
from tpcheck.numerics.global_index import GlobalIndex
from tpcheck.numerics.optimizers.choose import view_of
from tpcheck.numerics.optimizers.names import unwrapped_names
from tpcheck.numerics.precision import everything_in_float64
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.numerics.training_state import StateKey, StateTensor, TrainingState
from tpcheck.numerics.verdict import CheckAnswer
from tpcheck.world.world import World, spawn

_OTHER_SEED = 1_000_003  # added to the seed of the model that loads, whose own weights must not be the right ones


Steps = Sequence[Sequence[Batch]]
"""Of one DP rank: steps[step][micro_batch]."""


@dataclass(frozen=True, slots=True)
class _Way:
    """What the controller has to know of a way to resume: `WayToResume` without its functions, and where it saved."""

    folder: Path
    config: Mapping[str, Any]
    other_sizes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _FirstWorld:
    """One rank's part of the training that is not interrupted.

    Attributes:
        training: What it holds, when it saves and later; None where the backend has no way to resume.
        ways: The ways that saved without an error.
        failures: Why others did not, by way.
        tolerance: What rounding does to the training, for comparison at another topology; from the first rank alone.
        batches: This DP rank's, batches[step][micro_batch].
    """

    training: SavedTraining | None = None
    batches: Steps = ()
    ways: Mapping[str, _Way] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    tolerance: Tolerance | None = None


def verify_resume(request: Request, tolerance: Tolerance | None = None) -> CheckAnswer:
    """Compare the training that goes on from each way to save with the one that was not interrupted.

    Spawns a world that trains and saves, and then one for each way, at the same topology and, where the way allows it,
    at others.

    Args:
        tolerance: What rounding does to the training of this request, where that is known; else it is measured.

    Raises:
        RankFailure: A rank died or raised something that is no error of a way to save or load.
    """
    steps = max(2, request.options.steps)
    if steps != request.options.steps:  # it is that of a shorter training
        tolerance = None
    request = replace(request, options=replace(request.options, steps=steps))
    num_before = steps // 2
    answer = CheckAnswer(RESUME_CHECK, -1, {}, (), {})
    folder = Path(tempfile.mkdtemp(prefix="tpcheck-resume-"))
    try:
        begin_phase(f"{RESUME_CHECK}: training, saving and training on")
        with _spawned(request) as world:
            first: tuple[_FirstWorld, ...] = world.run(
                _train_and_save, request, folder, num_before, measures=tolerance is None
            )
        tolerance = first[0].tolerance if tolerance is None else tolerance
        expected = [rank.training for rank in first if rank.training is not None]
        if not expected:
            return replace(answer, not_compared={"resume": "the backend offers no way to save a training and go on"})
        answer = replace(answer, not_compared=dict(first[0].failures))
        for way, facts in first[0].ways.items():
            for variant in variants(request, facts.other_sizes, len(first[0].batches[0])):
                answer = answer.with_way(_resume(variant, request, way, facts, num_before, first, tolerance))
        return answer
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _spawned(request: Request) -> World:
    options = request.options
    return spawn(options.topology, timeout=options.timeout, device=options.device, also=preload_of(request))


def cannot_resume() -> CheckAnswer:
    """Return the answer on the ranks of a launcher, which cannot end and start anew."""
    reason = "the launcher's ranks cannot end and start anew: run the command without torchrun or srun"
    return CheckAnswer(RESUME_CHECK, -1, {}, (), {"resume": reason})


def variants(request: Request, other_sizes: Collection[str], accumulate: int) -> list[Request]:
    """Return the request, and those at other sizes of the axes and ZeRO stages at which this way can be loaded.

    At another dp each rank takes the micro-batches of two, or half of its own, so that a step has the same samples.

    Args:
        other_sizes: What may be another: see `WayToResume`.
        accumulate: Micro-batches of a step.
    """
    options, topology = request.options, request.options.topology
    elsewhere = replace(options, config=without_sizes(options.config), accumulate=accumulate)
    others = [options]
    if "tp" in other_sizes and topology.tp > 1:
        others.append(replace(elsewhere, topology=Topology(tp=topology.tp // 2, dp=topology.dp)))
    if "dp" in other_sizes:
        if topology.dp % 2 == 0:
            fewer = Topology(tp=topology.tp, dp=topology.dp // 2)
            others.append(replace(elsewhere, topology=fewer, accumulate=accumulate * 2))
        elif accumulate % 2 == 0:
            more = Topology(tp=topology.tp, dp=topology.dp * 2)
            others.append(replace(elsewhere, topology=more, accumulate=accumulate // 2))
    if "zero" in other_sizes and options.zero_stage in (1, 2):
        others.append(replace(elsewhere, zero_stage=3 - options.zero_stage))
    return [replace(request, options=variant) for variant in others]


def _sizes(options: RunOptions, before: RunOptions) -> str:
    micro_batches = "" if options.topology.dp == before.topology.dp else f", {options.accumulate} micro-batches"
    return f"at tp {options.topology.tp}, dp {options.topology.dp}, ZeRO {options.zero_stage}{micro_batches}"


def divided(by_dp_rank: Sequence[Steps], dp: int) -> list[list[list[Batch]]]:
    """Return the same micro-batches of every step for another number of DP ranks, as many for each."""
    steps: list[list[list[Batch]]] = [[] for _ in range(dp)]
    for of_step in zip(*by_dp_rank, strict=True):
        micro_batches = [batch for of_rank in of_step for batch in of_rank]
        each = len(micro_batches) // dp
        for number, of_rank in enumerate(steps):
            of_rank.append(micro_batches[number * each : (number + 1) * each])
    return steps


def _resume(
    variant: Request,
    request: Request,
    way: str,
    facts: _Way,
    num_before: int,
    first: Sequence[_FirstWorld],
    tolerance: Tolerance | None,
) -> WayOutcome:
    """Go on in new processes, and compare.

    A way that cannot be loaded at the sizes at which it saved is a finding; at other sizes it is no comparison.
    """
    options, is_same = variant.options, variant.options == request.options
    label = way if is_same else f"{way}, {_sizes(options, request.options)}"
    begin_phase(f"{RESUME_CHECK}: going on from {label}")
    config = overlay(options.config, facts.config)
    variant = replace(variant, options=replace(options, config=config))
    try:
        with _spawned(variant) as world:
            batches = divided([rank.batches for rank in first[:: request.options.topology.tp]], options.topology.dp)
            actual: tuple[ResumedTraining | str, ...] = world.run(
                _load_and_train, variant, facts.folder, way, num_before, batches
            )
    except (RankFailure, BackendError) as failure:
        cause = failure.exception if isinstance(failure, RankFailure) else failure
        if not isinstance(cause, BackendError):
            raise
        return _cannot_load(label, str(cause), is_same=is_same)
    expected = [rank.training for rank in first if rank.training is not None]
    resumed = [rank for rank in actual if isinstance(rank, ResumedTraining)]
    if len(resumed) < len(actual):
        return _cannot_load(label, next(rank for rank in actual if isinstance(rank, str)), is_same=is_same)
    if is_same:
        return compare_same_topology(label, num_before, expected, resumed)
    assert tolerance is not None
    return compare_other_topology(label, num_before, expected, resumed, tolerance)


def _in_short(error: Exception) -> str:
    """Return the error without what torch says again of each further parameter."""
    first, *others = str(error).strip().splitlines() or [""]
    more = f" {others[0].strip()}" if others else ""
    return f"{type(error).__name__}: {first}{more}" + (f" [{len(others) - 1} more lines]" if others[1:] else "")


def _cannot_load(way: str, reason: str, *, is_same: bool) -> WayOutcome:
    if not is_same:
        return WayOutcome(not_compared={way: reason})
    evidence = {"counted": ("way to resume", "fails", "fail"), "note": reason}
    finding = Finding(RESUME_CHECK, {"phase": "loaded", "field": way}, 1.0, 0.0, evidence=evidence)
    return WayOutcome({way: inf}, (finding,))


# ---- on the ranks


@contextmanager
def _session(request: Request, backend: Backend, options: TrainingOptions) -> Iterator[None]:
    with everything_in_float64(request.options.dtype == "float64"), backend.session(options):
        yield


def _train_and_save(
    rank: CommunicatingRank, request: Request, folder: Path, num_before: int, *, measures: bool
) -> _FirstWorld:
    """Train, save in every way, train on. Collective over the world.

    Args:
        measures: Measure the tolerance, where a way can be loaded at another topology.
    """
    request = with_user_code(request)
    backend = load_backend(request.options.backend)
    options = backend.resolved(training_options(request, rank.device))
    with _session(request, backend, options):
        reference = Reference.build(request, rank, options)
        options = replace(reference.options, checkpoints=str(folder), save_after=num_before)
        with blame_backend(backend, "sharding the model"):
            candidate = backend.shard(build_model(request, rank.device), rank, options)
        if isinstance(candidate, ResumesByItself):
            return _observe_saving(candidate, backend, rank, options, reference, measures=measures)
        if not isinstance(candidate, ResumesTraining) or not candidate.ways_to_resume():
            return _FirstWorld()
        view, indices = view_of(*candidate.trained()), _indices_of(candidate, rank)
        batches = [step[rank.topology.coordinate(rank.rank)["dp"]] for step in reference.batches]
        loss = None
        for micro_batches in batches[:num_before]:
            loss = _train_step(candidate, micro_batches)
        saved = _read_state(candidate, view, indices, loss)
        ways, failures = {}, {}
        for number, (way, how) in enumerate(candidate.ways_to_resume().items()):
            failure = _save(rank, how, folder / str(number))
            if failure is None:
                ways[way] = _Way(folder / str(number), how.config, how.other_sizes)
            else:
                failures[way] = f"saving raises {failure}"
        after = tuple(
            _read_state(candidate, view, indices, _train_step(candidate, micro_batches))
            for micro_batches in batches[num_before:]
        )
        tolerance = _measured(reference, rank) if measures and any(way.other_sizes for way in ways.values()) else None
        on_host = [[moved_batch(batch, torch.device("cpu")) for batch in step] for step in batches]
        return _FirstWorld(SavedTraining(saved, after), on_host, ways, failures, tolerance)


def _measured(reference: Reference, rank: CommunicatingRank) -> Tolerance | None:
    """Return the tolerance of the whole training on the first rank. Collective over the world."""
    _, tolerance = reference.train(rank)
    return tolerance if rank.rank == 0 else None


def _save(rank: CommunicatingRank, way: WayToResume, folder: Path) -> str | None:
    """Save into a new folder; return the first error that a rank raised."""
    if rank.rank == 0:
        folder.mkdir()
    rank.gather(None)
    failure = None
    try:
        way.save(folder)
    except Exception as error:
        failure = _in_short(error)
    return next((of_rank for of_rank in rank.gather(failure) if of_rank is not None), None)


def _load_and_train(
    rank: CommunicatingRank,
    request: Request,
    folder: Path,
    way: str,
    num_before: int,
    batches_by_dp_rank: Sequence[Steps],
) -> ResumedTraining | str:
    """Load into a model with other weights and train on; return why that is impossible. Collective over the world.

    Args:
        batches_by_dp_rank: What both trainings are given: batches[dp_rank][step][micro_batch].
    """
    request = with_user_code(request)
    backend = load_backend(request.options.backend)
    options = backend.resolved(training_options(request, rank.device))
    of_rank = batches_by_dp_rank[rank.topology.coordinate(rank.rank)["dp"]]
    batches = [[moved_batch(batch, rank.device) for batch in step] for step in of_rank]
    options = replace(options, batch_size=batch_size(batches[0][0]))
    if options.loop != "plain":
        options = replace(options, batches=list(zip(*batches_by_dp_rank, strict=True)))
        return _observe_resuming(rank, request, backend, replace(options, checkpoints=str(folder)), way)
    with _session(request, backend, options):
        with blame_backend(backend, "sharding the model"):
            candidate = backend.shard(_unlike_model(request, rank), rank, options)
        assert isinstance(candidate, ResumesTraining)
        view, indices = view_of(*candidate.trained()), _indices_of(candidate, rank)
        fresh = _read_state(candidate, view, indices)
        failure = None
        try:
            candidate.ways_to_resume()[way].load(folder)
        except Exception as error:
            failure = _in_short(error)
        failures = [of_rank for of_rank in rank.gather(failure) if of_rank is not None]
        if failures:
            return f"loading raises {failures[0]}"
        loaded = _read_state(candidate, view, indices)
        after = []
        for number in range(len(batches) - num_before):
            next_step = int(candidate.counters().get(STEPS_TAKEN, num_before + number))
            after.append(
                _read_state(candidate, view, indices, _train_step(candidate, batches[next_step % len(batches)]))
            )
        return ResumedTraining(fresh, loaded, tuple(after))


def _unlike_model(request: Request, rank: CommunicatingRank) -> nn.Module:
    """Return the model of the request with other weights."""
    unlike = replace(request, options=replace(request.options, seed=request.options.seed + _OTHER_SEED))
    return build_model(unlike, rank.device)


# ---- loops of libraries, which save and load by themselves


class _LoopReader:
    """Reads the state of a training where its first step begins, and after every step: a `StepObserver`.

    Attributes:
        begun: When the first forward pass begins, by when everything is loaded.
        after: After each step.
    """

    def __init__(self, candidate: Any, rank: CommunicatingRank) -> None:
        self.begun: TrainingState | None = None
        self.after: list[TrainingState] = []
        self._candidate = candidate
        self._view, self._indices = view_of(*candidate.trained()), _indices_of(candidate, rank)
        self._loss, self._batches = 0.0, tuple[str, ...]()

    def read(self, loss: float | None = None) -> TrainingState:
        """Copy what this rank holds. Not collective."""
        return replace(_read_state(self._candidate, self._view, self._indices, loss), batches=self._batches)

    def forward(self, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        if self.begun is None:
            self.begun = self.read()
        self._batches += (_batch_digest(batch),)
        return nullcontext()

    def backward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def add_loss(self, loss: torch.Tensor) -> None:
        self._loss += float(local_part(loss.detach()))

    def gradients_are_ready(self) -> None:
        pass

    def optimizing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stepped(self) -> None:
        self.after.append(self.read(self._loss))
        self._loss, self._batches = 0.0, ()

    def logged(self, values: Mapping[str, float]) -> None:
        pass


def _batch_digest(batch: Mapping[str, Any]) -> str:
    values = {name: digest(value) if isinstance(value, torch.Tensor) else repr(value) for name, value in batch.items()}
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def _observe_saving(
    candidate: ResumesByItself,
    backend: Backend,
    rank: CommunicatingRank,
    options: TrainingOptions,
    reference: Reference,
    *,
    measures: bool,
) -> _FirstWorld:
    """Let the loop train, save on its way, and train on. Collective over the world."""
    reader = _LoopReader(candidate, rank)
    seed_everything(rank.rank)  # the Trainer seeds all ranks equally, which would hide exchanged states
    with blame_backend(backend, "training and saving"):
        candidate.train(reader)
    num_before = options.save_after
    history = tuple(state.batches for state in reader.after)
    training = SavedTraining(reader.after[num_before - 1], tuple(reader.after[num_before:]), history)
    assert options.checkpoints is not None
    folder, resumes_by = Path(options.checkpoints), candidate.loop_resumes_by()
    ways = {way: _Way(folder, {}, other_sizes) for way, other_sizes in resumes_by.items()}
    dp_rank = rank.topology.coordinate(rank.rank)["dp"]
    batches = [[dict(batch) for batch in step[dp_rank]] for step in options.batches]
    tolerance = _measured(reference, rank) if measures and any(resumes_by.values()) else None
    return _FirstWorld(training, batches, ways, tolerance=tolerance)


def _observe_resuming(
    rank: CommunicatingRank, request: Request, backend: Backend, options: TrainingOptions, way: str
) -> ResumedTraining | str:
    """Let the loop load into a model with other weights and train on; return why it cannot. Collective over the world.

    Its `train` loads before anyone can look, so that the state before is that of a candidate which does not resume.
    """
    with _session(request, backend, options):
        with blame_backend(backend, "sharding the model"):
            candidate: Any = backend.shard(_model_of_loop(request, rank), rank, options)
        seed_everything(_OTHER_SEED + rank.rank)
        fresh = _LoopReader(candidate, rank).read()
        del candidate
    with _session(request, backend, options):
        model, failure = _model_of_loop(request, rank), None
        try:
            candidate = backend.shard(model, rank, replace(options, resume=way))
        except Exception as error:
            failure = _in_short(error)
        failures = [of_rank for of_rank in rank.gather(failure) if of_rank is not None]
        if failures:
            return f"loading raises {failures[0]}"
        reader = _LoopReader(candidate, rank)
        seed_everything(_OTHER_SEED + rank.rank)
        with blame_backend(backend, "training that was resumed"):
            candidate.train(reader)
        return ResumedTraining(fresh, reader.read() if reader.begun is None else reader.begun, tuple(reader.after))


def _model_of_loop(request: Request, rank: CommunicatingRank) -> nn.Module:
    """Return the model with other weights; a frozen base is the same: who goes on with adapters loads it again."""
    model = _unlike_model(request, rank)
    if is_peft_model(model):
        same = dict(build_model(request, rank.device).named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    parameter.copy_(same[name])
    return model


# ---- what a rank holds


_Indices = Mapping[str, GlobalIndex]  # by parameter: which elements this TP rank holds


def _indices_of(candidate: Candidate, rank: CommunicatingRank) -> _Indices:
    """Return which elements this rank holds of each parameter. Collective over the TP group."""
    tp_rank = rank.topology.coordinate(rank.rank)["tp"]
    return {name: GlobalIndex.from_layout(layout, tp_rank) for name, layout in candidate.layouts().items()}


def _train_step(candidate: Candidate, micro_batches: Sequence[Batch]) -> float:
    """Train a step; return the sum of the losses of this rank."""
    total = 0.0
    for batch in micro_batches:
        loss = loss_of(candidate.forward(copy_batch(batch)))
        candidate.backward(loss)
        total += float(local_part(loss.detach()))
    candidate.step()
    return total


def _read_state(candidate: Any, view: Any, indices: _Indices, loss: float | None = None) -> TrainingState:
    """Copy what this rank holds. Not collective."""
    tensors = {}
    names = {short: name for name, short in unwrapped_names(indices).items()}  # the view has no peft in its names
    for part in (*view.weights(), *view.states()):
        name = names.get(part.name, part.name)
        index, of_shard = part.index, indices.get(name)
        # A library may mark no parameter as cut, or keep its groups to itself: the candidate knows the whole shapes.
        if of_shard is not None and (index is None or index.shape != of_shard.shape):
            if part.values.shape == of_shard.local_shape:
                index = of_shard
            elif part.index_in_shard is not None and of_shard.local_shape == of_shard.shape:
                index = part.index_in_shard  # of a whole tensor
        copy = part.values.detach().cpu().clone()
        tensors[StateKey(part.kind, name, part.state)] = StateTensor(copy, index)
    for name, buffer in candidate.module.named_buffers():
        tensors[StateKey("buffer", name)] = StateTensor(local_part(buffer).detach().cpu().clone(), None)
    numbers = {
        f"{option}{OF_GROUP}{number}": value
        for number, group in enumerate(view.groups())
        for option, value in group.options.items()
    }
    numbers |= {"loss scale": view.loss_scale(), **candidate.counters()}
    return TrainingState(tensors, numbers, _generators(), loss)


def _generators() -> dict[str, str]:
    """Return digests of the states of this process's generators."""
    states: dict[str, Any] = {"torch generator": torch.get_rng_state().tolist(), "python generator": random.getstate()}
    if "numpy" in sys.modules:
        states["numpy generator"] = sys.modules["numpy"].random.get_state(legacy=True)
    if uses_cuda():
        states["cuda generator"] = torch.cuda.get_rng_state().tolist()
    return {name: hashlib.sha256(repr(state).encode()).hexdigest() for name, state in states.items()}
