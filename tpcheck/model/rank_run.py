"""What one rank does in a verification, from the seed to the answer of its TP group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tpcheck.backends.interface import Backend, Candidate, RankLike, TrainingOptions
from tpcheck.backends.registry import load_backend
from tpcheck.core.digests import digest
from tpcheck.model.batches import Batch
from tpcheck.model.build import built_model, require_equal_models
from tpcheck.model.candidate import CandidateStart, sharded, trained
from tpcheck.model.measured_reference import CommunicatingRank, MeasuredReference
from tpcheck.model.options import Request
from tpcheck.model.reference import ReferenceStep
from tpcheck.model.saving import saved_answer, set_gathered, with_saved
from tpcheck.model.teacher_forcing import IsolatedPass, gradients_alone, isolated_pass, remade, terms_among
from tpcheck.numerics.answer import GroupAnswer, forbids_training, full_answer, start_answer
from tpcheck.numerics.checks import CHECKPOINT_CHECK
from tpcheck.numerics.evidence import Evidence, ForcedModules, RankFacts, Step, TensorKey
from tpcheck.numerics.perturb import everything_in_float64, nothing_raised
from tpcheck.numerics.tolerance import Tolerance

CallDigests = Mapping[str, tuple[str, ...]]  # module -> what each of its calls returned, in the order of the calls


def call_digests(step: Step) -> CallDigests:
    """Return the digests of the outputs of every call, for the modules that are called more than once.

    Args:
        step: A step of the reference, which is the same to the bit on every rank but for the order of calls.
    """
    found: dict[str, dict[int, str]] = defaultdict(lambda: defaultdict(str))
    for key, tensor in step.activations.items():
        if (key.phase, key.role) == ("forward", "output"):
            found[key.module][key.call] += digest(tensor)
    return {module: tuple(calls.values()) for module, calls in found.items() if len(calls) > 1}


def renumbered(step: Step, own: CallDigests, first: CallDigests) -> Step:
    """Return a rank's step with its calls numbered as on the first rank, where both made the same calls."""
    numbers = {module: _numbers(calls, first[module]) for module, calls in own.items() if _same(calls, first, module)}
    if all(mapping == list(range(len(mapping))) for mapping in numbers.values()):
        return step

    def moved(key: TensorKey) -> TensorKey:
        return replace(key, call=numbers[key.module][key.call]) if key.module in numbers else key

    return replace(step, activations={moved(key): tensor for key, tensor in step.activations.items()})


def _same(calls: tuple[str, ...], first: CallDigests, module: str) -> bool:
    return sorted(calls) == sorted(first.get(module, ()))


def _numbers(calls: tuple[str, ...], first: tuple[str, ...]) -> list[int]:
    """Return, for each call, its number on the first rank; equal calls keep their order."""
    places: dict[str, list[int]] = defaultdict(list)
    for number, outputs in enumerate(first):
        places[outputs].append(number)
    return [places[outputs].pop(0) for outputs in calls]


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankAnswer:
    """What a rank brings home.

    Attributes:
        group: The answer of the rank's TP group, from its first rank; None from the others.
        versions: Of the packages under test.
    """

    group: GroupAnswer | None
    versions: Mapping[str, str]


def verify_on_rank(rank: CommunicatingRank, request: Request) -> RankAnswer:
    """Run reference, replays and candidate on this rank; compare on the first rank of each TP group.

    Collective over the world.

    Raises:
        UsageError: The model or the batch cannot be used.
        BackendError: The backend crashed.
    """
    backend = load_backend(request.options.backend)
    options = backend.resolved(_options(request, rank.device))
    with everything_in_float64(request.options.dtype == "float64"), backend.session(options):
        reference = MeasuredReference.of(request, rank, options)
        twin = built_model(request, rank.device)
        require_equal_models(twin, reference.model, reference.state)
        names = tuple(reference.parameters)
        candidate, start = sharded(backend, twin, names, rank, reference.options)
        evidence = _start_evidence(rank, request, reference, start)
        with nothing_raised():
            answer = None if evidence is None else start_answer(evidence, request.options.check_names)
        stops = answer is not None and forbids_training(answer)
        if not any(rank.gather(stops)):
            saves = CHECKPOINT_CHECK in request.options.check_names
            saved = [saved_answer(rank, candidate, reference.model, step=-1)] if saves else []
            full = _both_trained(rank, request, reference, _Sharded(backend, candidate, start), evidence)
            if full is not None and answer is not None:
                with nothing_raised():
                    answer = full_answer(answer, full, request.options.check_names)
            if saves:
                unknown = () if full is None else set_gathered(reference.model, full)
                saved.append(
                    saved_answer(rank, candidate, reference.model, step=request.options.steps - 1, unknown=unknown)
                )
            answer = with_saved(answer, saved)
    return RankAnswer(answer, backend.versions())


def _options(request: Request, device: torch.device) -> TrainingOptions:
    return TrainingOptions(
        dtype=getattr(torch, request.options.dtype),
        zero_stage=request.options.zero_stage,
        config=request.options.config,
        ignore_plan=request.options.ignore_plan,
        rebuild=partial(built_model, request, device),
    )


@dataclass(frozen=True, slots=True)
class _Sharded:
    """The sharded model, with what made it and what it starts from."""

    backend: Backend
    candidate: Candidate
    start: CandidateStart


def _both_trained(
    rank: CommunicatingRank,
    request: Request,
    reference: MeasuredReference,
    sharded: _Sharded,
    evidence: Evidence | None,
) -> Evidence | None:
    """Train both sides; return `evidence` with their steps, on the first rank of each TP group. Collective."""
    backend, candidate = sharded.backend, sharded.candidate
    own_batches = [by_dp_rank[_dp_rank(rank)] for by_dp_rank in reference.data]
    steps, tolerance = reference.trained(rank, request)
    isolates = request.options.dtype != "float64"  # whose rounding hides nothing
    alone = reference.isolated(rank, request, steps[0]) if isolates else None
    fed = _isolated_pass(backend, candidate, own_batches[0], steps[0], rank) if isolates else None
    made = trained(backend, candidate, tuple(sharded.start.weights), own_batches)
    full = _with_isolated(_step_evidence(rank, evidence, steps, tolerance, made), rank, fed, alone)
    return None if full is None else replace(full, recomputed=remade(reference.model, reference.state, full))


def _isolated_pass(
    backend: Backend, candidate: Candidate, batch: Batch, first: ReferenceStep, rank: RankLike
) -> IsolatedPass:
    """Run the modules one by one, once to learn which gradients are terms of sums, and once in earnest. Collective."""
    trial = isolated_pass(backend, candidate, batch, first, rank)
    everyone = _gathered_to_first(trial.step.activations, rank)
    terms = None if everyone is None else terms_among(everyone, first[_dp_rank(rank)].activations)
    return isolated_pass(backend, candidate, batch, first, rank, _from_first(terms, rank))


def _start_evidence(
    rank: CommunicatingRank, request: Request, reference: MeasuredReference, start: CandidateStart
) -> Evidence | None:
    """Return what is known before the first step, on the first rank of each TP group. Collective."""
    facts = rank.gather(RankFacts(start.group_ranks, (start.digests,)))
    starts = _gathered_to_first(start, rank)
    if starts is None:
        return None
    return Evidence(
        topology=rank.topology,
        dp_rank=_dp_rank(rank),
        dtype=request.options.dtype,
        initial=reference.parameters,
        initial_parts=tuple(one.weights for one in starts),
        layouts=start.layouts,
        reference=(),
        candidate=(),
        buffers=tuple(reference.buffers),
        facts=facts,
        tolerance=Tolerance(0.0, request.options.replays, {}),
    )


def _step_evidence(
    rank: CommunicatingRank,
    start: Evidence | None,
    reference: Sequence[ReferenceStep],
    tolerance: Tolerance,
    made: tuple[Step, ...],
) -> Evidence | None:
    """Add to `start` both sides' steps, on the first rank of each TP group. Collective."""
    digests = rank.gather(tuple(step.digests for step in made))
    own_calls = tuple(call_digests(step[_dp_rank(rank)]) for step in reference)
    everyone = _gathered_to_first((made, own_calls), rank)
    if start is None or everyone is None:
        return None
    steps = [
        [renumbered(step, *calls) for step, *calls in zip(theirs, their_calls, own_calls, strict=True)]
        for theirs, their_calls in everyone
    ]
    facts = zip(start.facts, digests, strict=True)
    return replace(
        start,
        reference=tuple(step[start.dp_rank] for step in reference),
        candidate=tuple(zip(*steps, strict=True)),
        facts=tuple(replace(fact, digests=(*fact.digests, *of_steps)) for fact, of_steps in facts),
        tolerance=tolerance,
    )


def _with_isolated(
    full: Evidence | None, rank: RankLike, own: IsolatedPass | None, tolerance: Tolerance | None
) -> Evidence | None:
    """Add the passes of isolated modules, where they were made. Collective over the TP group."""
    if own is None or tolerance is None:
        return full
    everyone = _gathered_to_first(own, rank)
    if full is None or everyone is None:
        return full
    first = full.reference[0]
    isolated = ForcedModules(
        reference=replace(first, gradients=gradients_alone(first), local_gradients={}),
        candidate=tuple(one.step for one in everyone),
        forced_inputs=frozenset.intersection(*(one.fed for one in everyone)),
        tolerance=tolerance,
    )
    return replace(full, forced_modules=isolated)


def _dp_rank(rank: RankLike) -> int:
    return rank.topology.coordinate(rank.rank)["dp"]


def _gathered_to_first(own: T, rank: RankLike) -> list[T] | None:
    """Return the values of a whole TP group on its first rank, by tp_rank; None on the others."""
    group = rank.topology.peers(rank.rank, "tp")
    if len(group) == 1:
        return [own]
    values: list[Any] | None = [None] * len(group) if rank.rank == group[0] else None
    with nothing_raised():
        dist.gather_object(own, values, dst=group[0], group=rank.group("tp"))
    return values


def _from_first(value: T | None, rank: RankLike) -> T | None:
    """Return on a whole TP group what its first rank has."""
    group = rank.topology.peers(rank.rank, "tp")
    values = [value]
    if len(group) > 1:
        dist.broadcast_object_list(values, src=group[0], group=rank.group("tp"))
    return values[0]
