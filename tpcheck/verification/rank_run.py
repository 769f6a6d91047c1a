"""What one rank does in a verification, from the seed to the answer of its TP group."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from tpcheck.adapters import TrainingOptions, load_backend
from tpcheck.adapters.protocols import RankLike
from tpcheck.collect import everything_in_float64
from tpcheck.records import Evidence, RankFacts
from tpcheck.tolerance import Tolerance, largest_deviations
from tpcheck.verification.answer import GroupAnswer, answer
from tpcheck.verification.batches import Batch, batch_size, batches
from tpcheck.verification.candidate import CandidateRun, run_candidate
from tpcheck.verification.model import built_model, require_equal_models
from tpcheck.verification.reference import ReferenceStep, recorded, replayed_deviations
from tpcheck.verification.request import Request


class CommunicatingRank(RankLike, Protocol):
    """A rank that can exchange objects with all others."""

    def gather(self, value: Any) -> tuple[Any, ...]: ...


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
    backend = load_backend(request.backend)
    topology = rank.topology
    position = topology.coordinate(rank.rank)
    dtype: torch.dtype = getattr(torch, request.dtype)
    with everything_in_float64(dtype is torch.float64):
        model = built_model(request, rank.device)
        twin = built_model(request, rank.device)
        require_equal_models(model, twin)
        data = batches(request, model, topology.dp, rank.device)
        options = _options(request, dtype, data)
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        buffers = tuple(name for name, _ in model.named_buffers())
        reference = recorded(model, data, options)
        tolerance = _tolerance(rank, request, model, initial, data, options, reference)
        with backend.session(options):
            own_batches = [by_dp_rank[position["dp"]] for by_dp_rank in data]
            run = run_candidate(backend, twin, tuple(parameters), own_batches, rank, options)
    facts = rank.gather(RankFacts(run.group_ranks, (run.initial_digests, *(step.digests for step in run.steps))))
    runs = _gathered_to_first(run, rank)
    if runs is None:
        return RankAnswer(None, backend.versions())
    evidence = Evidence(
        topology=topology,
        dp_rank=position["dp"],
        dtype=request.dtype,
        initial=parameters,
        initial_parts=tuple(one.initial for one in runs),
        layouts=run.layouts,
        reference=tuple(step.by_dp_rank[position["dp"]] for step in reference),
        candidate=tuple(zip(*(one.steps for one in runs), strict=True)),
        buffers=buffers,
        facts=facts,
        tolerance=tolerance,
    )
    return RankAnswer(answer(evidence, request.checks), backend.versions())


def _options(request: Request, dtype: torch.dtype, data: Sequence[Sequence[Batch]]) -> TrainingOptions:
    return TrainingOptions(
        dtype=dtype,
        zero_stage=request.zero_stage,
        batch_size=batch_size(data[0][0]),
        config=request.config,
        ignore_plan=request.ignore_plan,
    )


def _tolerance(
    rank: CommunicatingRank,
    request: Request,
    model: nn.Module,
    initial: Mapping[str, torch.Tensor],
    data: Sequence[Sequence[Batch]],
    options: TrainingOptions,
    reference: Sequence[ReferenceStep],
) -> Tolerance:
    """Measure the tolerance: the ranks share the replays between them. Collective."""
    own = range(rank.rank, request.num_replays, rank.topology.world_size)
    measured: list[Mapping[Hashable, float]] = [
        replayed_deviations(model, initial, data, options, reference, seed=request.seed * 1000 + replay)
        for replay in own
    ]
    everyone: list[Mapping[Hashable, float]] = list(rank.gather(largest_deviations(measured)))
    scalar_eps = torch.finfo(torch.promote_types(options.dtype, torch.float32)).eps
    return Tolerance(scalar_eps, request.num_replays, largest_deviations(everyone))


def _gathered_to_first(run: CandidateRun, rank: CommunicatingRank) -> list[CandidateRun] | None:
    """Return the runs of a whole TP group on its first rank, by tp_rank; None on the others."""
    group = rank.topology.peers(rank.rank, "tp")
    if len(group) == 1:
        return [run]
    is_first = rank.rank == group[0]
    runs: list[Any] | None = [None] * len(group) if is_first else None
    dist.gather_object(run, runs, dst=group[0], group=rank.group("tp"))
    return runs
