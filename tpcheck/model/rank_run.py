"""What one rank does in a verification, from building the model to the answer of its TP group."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tpcheck.backends.interface import Backend, Candidate, RankLike, TrainingOptions
from tpcheck.backends.peft_models import peft_version
from tpcheck.backends.registry import load_backend
from tpcheck.core.check_names import CHECKPOINT_CHECK, INITIALISATION_CHECK, RESUME_CHECK, need_steps
from tpcheck.core.clipping import Clipping
from tpcheck.core.digests import digest
from tpcheck.core.phases import begin_phase
from tpcheck.model.blame import internal_error, is_of_tpcheck, naming_indivisible_sizes, progress_of
from tpcheck.model.build import build_model, require_equal_models
from tpcheck.model.candidate import CandidateStart, shard, train
from tpcheck.model.fused_reading import find_blocks_read
from tpcheck.model.implementations import num_compiled_graphs, require_compiled
from tpcheck.model.initialising import verify_initialisation
from tpcheck.model.on_shards import steps_on_shards
from tpcheck.model.options import RankAnswer, Request
from tpcheck.model.recompute import compute_alone, recompute_outputs
from tpcheck.model.reference import CommunicatingRank, Reference, ReferenceStep
from tpcheck.model.saving import add_saved, load_gathered, verify_saved
from tpcheck.model.teacher_forcing import (
    ForcedPass,
    find_partial_gradients,
    forced_modules,
    forced_tolerance,
    replica_gradients,
)
from tpcheck.model.user_code import with_user_code
from tpcheck.numerics.checks.clipping import observed_clipping
from tpcheck.numerics.evidence import Evidence, ForcedModules, RankFacts, Step, TensorKey
from tpcheck.numerics.group_answer import full_answer, start_answer
from tpcheck.numerics.precision import everything_in_float64, torch_function_disabled
from tpcheck.numerics.recorder import CollectiveLog, is_compiled
from tpcheck.numerics.tensors import pickled
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.numerics.verdict import GroupAnswer, forbids_training

T = TypeVar("T")

# An epsilon, and whether small gradients are scaled up: a step may show one of them, and a later one the other.
_PARTS_OF_CONVENTION = 2


def verify_on_rank(rank: CommunicatingRank, request: Request) -> RankAnswer:
    """Run reference, replays and candidate on this rank; compare on the first rank of each TP group.

    Collective over the world.

    Raises:
        UsageError: The model or the batch cannot be used.
        BackendError: The backend crashed.
    """
    groups = {rank.topology.peers(rank.rank, axis): rank.group(axis) for axis in ("dp", "tp")}
    log = CollectiveLog(groups)
    try:
        return _verify(rank, request, log)
    except Exception as error:
        raised = internal_error(error) if is_of_tpcheck(error) else error
        with suppress(Exception):  # some exceptions have no attributes of one's own
            raised.tpcheck_details = progress_of(log, rank.topology, rank.rank)  # type: ignore[attr-defined]
        if raised is error:
            raise
        raise raised from error


def _verify(rank: CommunicatingRank, request: Request, log: CollectiveLog) -> RankAnswer:
    """Do as `verify_on_rank`; add to `log` every collective of the candidate's steps."""
    request = with_user_code(request)
    backend, checks = load_backend(request.options.backend), request.options.check_names
    options = backend.resolved(training_options(request, rank.device))
    with everything_in_float64(request.options.dtype == "float64"), backend.session(options):
        initialised = None
        if INITIALISATION_CHECK in checks:
            begin_phase(f"{INITIALISATION_CHECK}: models made from scratch", rank.rank)
            initialised = verify_initialisation(rank, request, backend, options)
            if set(checks) == {INITIALISATION_CHECK}:
                return RankAnswer(GroupAnswer((initialised,)) if rank.rank == 0 else None, backend.versions())
        reference = Reference.build(request, rank, options)
        twin = build_model(request, rank.device)
        require_equal_models(twin, reference.model, reference.state)
        config, tp = getattr(reference.model, "config", None), rank.topology.tp
        with naming_indivisible_sizes(config, tp):
            candidate, start = shard(backend, twin, reference.parameters, rank, reference.options)
            log.meet(f"{backend.name}, sharding the model")
        evidence, tolerance = _start_evidence(rank, request, reference, start), None
        with torch_function_disabled():
            answer = None if evidence is None else start_answer(evidence, checks)
        if need_steps(checks) and not any(rank.gather(answer is not None and forbids_training(answer))):
            saves = CHECKPOINT_CHECK in checks
            saved = [verify_saved(rank, candidate, reference.model, step=-1)] if saves else []
            with naming_indivisible_sizes(config, tp):
                full = _train_both(rank, request, reference, backend, candidate, start, evidence, log)
            if full is not None and evidence is not None and rank.rank == 0:
                is_kept = request.keeps_tolerance and full.clipping == evidence.clipping
                tolerance = full.tolerance if RESUME_CHECK in checks or is_kept else None
            if full is not None and answer is not None:
                with torch_function_disabled():
                    answer = full_answer(answer, full, checks)
            if saves:
                unknown = () if full is None else load_gathered(reference.model, full)
                last = request.options.steps - 1
                saved.append(verify_saved(rank, candidate, reference.model, step=last, unknown=unknown))
            answer = add_saved(answer, saved)
    if answer is not None and initialised is not None and rank.rank == 0:  # it is of all ranks
        answer = replace(answer, answers=(initialised, *answer.answers))
    return RankAnswer(answer, {**backend.versions(), **peft_version(reference.model)}, options.notes, tolerance)


def training_options(request: Request, device: torch.device) -> TrainingOptions:
    """Return how both sides train."""
    options = request.options
    return TrainingOptions(
        dtype=getattr(torch, options.dtype),
        zero_stage=options.zero_stage,
        config=options.config,
        ignore_plan=options.ignore_plan,
        optimizer=options.optimizer,
        accumulate=options.accumulate,
        steps=options.steps,
        loss=options.loss,
        attention=options.attention,
        experts=options.experts,
        checkpointing=options.checkpointing,
        reentrant=options.reentrant,
        compile=options.compile,
        compile_layers=options.compile_layers,
        loop=options.loop,
        rebuild=partial(build_model, request, device),
    )


def _train_both(
    rank: CommunicatingRank,
    request: Request,
    reference: Reference,
    backend: Backend,
    candidate: Candidate,
    start: CandidateStart,
    evidence: Evidence | None,
    log: CollectiveLog,
) -> Evidence | None:
    """Train both sides; return `evidence` with their steps, on the first rank of each TP group. Collective."""
    batches = [step[_dp_rank(rank)] for step in reference.batches]
    replayed = f", {1 + reference.replays} times more to measure what rounding does"
    begin_phase(f"training the unsharded model{replayed if request.tolerance is None else ''}", rank.rank)
    steps, tolerance = reference.train(rank, request.tolerance)
    # In float64 rounding hides nothing; what a step that overflows has is not compared. Of a model that is compiled as
    # a whole no module is seen, and the backward pass inside its forward makes torch 2.13 compile DTensors with shapes
    # that are symbols, which it cannot.
    forces = request.options.dtype != "float64" and not steps[0][0].is_skipped and not is_compiled(candidate.module)
    module_tolerance = forced_tolerance(reference, rank, steps[0]) if forces else None
    num_graphs = num_compiled_graphs()  # the first pass compiles, and that is the one with teacher forcing
    forced = _forced_pass(backend, candidate, reference, steps[0], rank, log) if forces else None
    begin_phase("training the sharded model", rank.rank)
    candidate_steps = train(backend, candidate, tuple(start.weights), batches, log)
    require_compiled(reference.options, num_compiled_graphs() - num_graphs)
    begin_phase("comparing the steps of both", rank.rank)
    full = _step_evidence(rank, evidence, steps, tolerance, candidate_steps)
    for _ in range(_PARTS_OF_CONVENTION):
        clipping = _observed_clipping(rank, full)
        if clipping is None:
            break
        reference, steps, tolerance = reference.train_clipping_as(clipping, rank)
        if full is not None:
            of_group = tuple(step[full.dp_rank] for step in steps)
            full = replace(full, reference=of_group, tolerance=tolerance, clipping=clipping)
    if forced is not None and module_tolerance is not None:
        full = _with_forced(full, rank, forced, module_tolerance)
    if full is None:
        return None
    model, state = reference.model, reference.state
    decayed_by = reference.options.decayed_parameters
    decayed = None if decayed_by is None else decayed_by(model)
    full = replace(full, on_shards=steps_on_shards(reference.options, full, decayed))
    return replace(
        full,
        recomputed=recompute_outputs(model, state, full),
        computed_alone=compute_alone(model, state, full),
        blocks_read=find_blocks_read(model, state, full, reference.batches[0][full.dp_rank][0]),
    )


def _observed_clipping(rank: CommunicatingRank, full: Evidence | None) -> Clipping | None:
    """Return the convention by which all TP groups clip; None where that is the reference's, or differs. Collective."""
    with torch_function_disabled():
        observed = None if full is None else (full.clipping, observed_clipping(full))
    known = {pair for pair in rank.gather(observed) if pair is not None}
    assumed, clipping = known.pop() if len(known) == 1 else (None, None)
    return None if clipping == assumed else clipping


def _forced_pass(
    backend: Backend,
    candidate: Candidate,
    reference: Reference,
    first: ReferenceStep,
    rank: RankLike,
    log: CollectiveLog,
) -> ForcedPass:
    """Run the modules with teacher forcing, once to find the partial gradients, and again with these known."""
    batch, share = reference.batches[0][_dp_rank(rank)][0], reference.first_share
    trial = forced_modules(backend, candidate, batch, first, rank, share=share, log=log)
    by_tp_rank = _gather_to_first(trial.step.activations, rank)
    partial_gradients = [
        None if by_tp_rank is None else find_partial_gradients(by_tp_rank, first[_dp_rank(rank)].activations)
    ]
    if rank.topology.tp > 1:
        dist.broadcast_object_list(
            partial_gradients, src=rank.topology.peers(rank.rank, "tp")[0], group=rank.group("tp")
        )
    return forced_modules(backend, candidate, batch, first, rank, partial_gradients[0], share=share, log=log)


def _start_evidence(
    rank: CommunicatingRank, request: Request, reference: Reference, start: CandidateStart
) -> Evidence | None:
    """Return what is known before the first step, on the first rank of each TP group. Collective."""
    facts = rank.gather(RankFacts(start.group_ranks, (start.digests,)))
    by_tp_rank = _gather_to_first(start, rank)
    if by_tp_rank is None:
        return None
    return Evidence(
        topology=rank.topology,
        dp_rank=_dp_rank(rank),
        dtype=request.options.dtype,
        initial=reference.parameters,
        initial_parts=tuple(of_rank.weights for of_rank in by_tp_rank),
        layouts=start.layouts,
        lost=start.lost,
        reference=(),
        candidate=(),
        buffers=tuple(reference.buffers),
        facts=facts,
        tolerance=Tolerance(0.0, request.options.replays, {}),
        labels=reference.labels,
        clipping=reference.options.clipping,
        frozen=frozenset(name for name, parameter in reference.model.named_parameters() if not parameter.requires_grad),
    )


def _step_evidence(
    rank: CommunicatingRank,
    start: Evidence | None,
    reference: Sequence[ReferenceStep],
    tolerance: Tolerance,
    candidate: tuple[Step, ...],
) -> Evidence | None:
    """Add to `start` both sides' steps, on the first rank of each TP group. Collective."""
    digests = rank.gather(tuple(step.digests for step in candidate))
    calls = tuple(call_digests(step[_dp_rank(rank)]) for step in reference)
    by_tp_rank = _gather_to_first((candidate, calls), rank)
    if start is None or by_tp_rank is None:
        return None
    steps = [
        [
            align_calls(step.without_gradients() if of_reference[0].is_skipped else step, *step_calls)
            for step, of_reference, *step_calls in zip(rank_steps, reference, rank_calls, calls, strict=True)
        ]
        for rank_steps, rank_calls in by_tp_rank
    ]
    facts = zip(start.facts, digests, strict=True)
    return replace(
        start,
        reference=tuple(step[start.dp_rank] for step in reference),
        candidate=tuple(zip(*steps, strict=True)),
        facts=tuple(replace(fact, digests=(*fact.digests, *of_steps)) for fact, of_steps in facts),
        tolerance=tolerance,
    )


def _with_forced(full: Evidence | None, rank: RankLike, forced: ForcedPass, tolerance: Tolerance) -> Evidence | None:
    """Add the passes with teacher forcing. Collective over the TP group."""
    by_tp_rank = _gather_to_first(forced, rank)
    if full is None or by_tp_rank is None:
        return full
    first = full.reference[0]
    on_all = frozenset.intersection(*(of_rank.forced for of_rank in by_tp_rank))
    forced_step = ForcedModules(
        reference=replace(first, gradients=replica_gradients(first), local_gradients={}),
        candidate=tuple(of_rank.step for of_rank in by_tp_rank),
        forced_inputs=on_all,
        forced_on_some=frozenset.union(*(of_rank.forced for of_rank in by_tp_rank)) - on_all,
        tolerance=tolerance,
    )
    return replace(full, forced_modules=forced_step)


# (module, micro-batch) -> digest of the outputs of each of its calls, in order
CallDigests = Mapping[tuple[str, int], tuple[str, ...]]


def call_digests(step: Step) -> CallDigests:
    """Return the digests of the outputs of every call, for the modules that are called more than once.

    Args:
        step: A step of the reference, which is bitwise the same on every rank except for the order of calls.
    """
    digests: dict[tuple[str, int], dict[int, str]] = defaultdict(lambda: defaultdict(str))
    for key, tensor in step.activations.items():
        if (key.phase, key.role) == ("forward", "output"):
            digests[key.module, key.micro_batch][key.call] += digest(tensor)
    return {place: tuple(calls.values()) for place, calls in digests.items() if len(calls) > 1}


def align_calls(step: Step, calls: CallDigests, first: CallDigests) -> Step:
    """Return a rank's step with its calls numbered as on the first rank, where both made the same calls.

    Args:
        calls: The rank's calls.
        first: The first rank's calls.
    """
    numbers = {
        place: _numbers(digests, first[place])
        for place, digests in calls.items()
        if sorted(digests) == sorted(first.get(place, ()))
    }
    if all(number == list(range(len(number))) for number in numbers.values()):
        return step

    def aligned(key: TensorKey) -> TensorKey:
        known = numbers.get((key.module, key.micro_batch))
        return key if known is None else replace(key, call=known[key.call])

    return replace(step, activations={aligned(key): tensor for key, tensor in step.activations.items()})


def _numbers(calls: tuple[str, ...], first: tuple[str, ...]) -> list[int]:
    """Return, for each call, its number on the first rank; equal calls keep their order."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, outputs in enumerate(first):
        numbers[outputs].append(number)
    return [numbers[outputs].pop(0) for outputs in calls]


def _dp_rank(rank: RankLike) -> int:
    return rank.topology.coordinate(rank.rank)["dp"]


def _gather_to_first(value: T, rank: RankLike) -> list[T] | None:
    """Return the values of a whole TP group on its first rank, by tp_rank; None on the others."""
    group = rank.topology.peers(rank.rank, "tp")
    if len(group) == 1:
        return [value]
    process_group = rank.group("tp")
    with torch_function_disabled():
        own = pickled(value)
        if dist.get_backend(process_group) == "gloo":
            pickles = _gather_bytes(own, rank.rank, group, process_group)
        else:
            pickles = [None] * len(group) if rank.rank == group[0] else None
            dist.gather_object(own, pickles, dst=group[0], group=process_group)
        return None if pickles is None else [pickle.loads(of_rank) for of_rank in pickles]


def _gather_bytes(own: bytes, rank: int, group: Sequence[int], process_group: Any) -> list[Any] | None:
    """Return the bytes of all ranks on the first one; on the others None.

    `dist.gather_object` copies them several times on either side, what the first rank has included, which was half of
    the pages that a rank of a small verification was given (19,500 of 43,800). It is one collective for every rank:
    gloo counts each `send` and `recv`, of which the first rank has more, and torch's check of collectives compares the
    counts.
    """
    size = torch.tensor([len(own)])
    sizes = [torch.empty_like(size) for _ in group]
    dist.all_gather(sizes, size, group=process_group)
    is_first, nothing = rank == group[0], [0] * len(group)
    received_sizes = [0, *(int(of_rank) for of_rank in sizes[1:])] if is_first else nothing
    sent_sizes = nothing if is_first else [len(own), *nothing[1:]]
    received = torch.empty(sum(received_sizes), dtype=torch.uint8)
    sent = torch.empty(0, dtype=torch.uint8) if is_first else torch.frombuffer(bytearray(own), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=process_group)
    if not is_first:
        return None
    parts = received.split(received_sizes[1:])  # type: ignore[no-untyped-call]
    return [own, *(part.numpy() for part in parts)]
