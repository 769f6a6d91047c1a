"""The unsharded model, trained, and how far rounding alone moves each of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from tpcheck.backends.interface import RankLike, TrainingOptions
from tpcheck.model.batches import Batch, batch_size, batches
from tpcheck.model.build import built_model
from tpcheck.model.options import Request
from tpcheck.model.reference import Deviations, ReferenceStep, recorded, replayed_deviations, require_still
from tpcheck.model.teacher_forcing import isolated_deviations
from tpcheck.numerics.snapshots import State, buffers_of, parameters_of
from tpcheck.numerics.tolerance import Tolerance, largest_deviations


class CommunicatingRank(RankLike, Protocol):
    """A rank that can exchange objects with all others."""

    def gather(self, value: Any) -> tuple[Any, ...]: ...


@dataclass(frozen=True, slots=True)
class MeasuredReference:
    """The unsharded model, and what both sides start from and are trained on."""

    model: nn.Module
    data: list[list[Batch]]
    options: TrainingOptions
    parameters: State
    buffers: State

    @property
    def state(self) -> State:
        return {**self.parameters, **self.buffers}

    @classmethod
    def of(cls, request: Request, rank: RankLike, options: TrainingOptions) -> MeasuredReference:
        model = built_model(request, rank.device)
        data = batches(request, model, rank.topology.dp, rank.device)
        return cls(
            model=model,
            data=data,
            options=replace(options, batch_size=batch_size(data[0][0])),
            parameters=parameters_of(model),
            buffers=buffers_of(model),
        )

    def trained(self, rank: CommunicatingRank, request: Request) -> tuple[list[ReferenceStep], Tolerance]:
        """Train the reference and measure the tolerance. The ranks share the replays between them. Collective.

        Raises:
            UsageError: The model does not compute the same each time.
        """
        steps = recorded(self.model, self.data, self.options)
        start = (self.parameters, self.buffers)

        def replayed(eps: float, seed: int) -> Deviations:
            return replayed_deviations(self.model, start, self.data, self.options, steps, eps=eps, seed=seed)

        measured = self._measured(rank, request, replayed)
        still = next(one for one in rank.gather(measured.pop(0, None)) if one is not None)
        require_still(still)
        return steps, self._tolerance(rank, request, measured)

    def isolated(self, rank: CommunicatingRank, request: Request, first: ReferenceStep) -> Tolerance:
        """Measure the tolerance of modules that are fed what the reference's were fed in the first step. Collective."""
        start = (self.parameters, self.buffers)

        def replayed(eps: float, seed: int) -> Deviations:
            return isolated_deviations(self.model, start, self.data[0], first, eps=eps, seed=seed)

        return self._tolerance(rank, request, self._measured(rank, request, replayed))

    def _measured(
        self, rank: RankLike, request: Request, replayed: Callable[[float, int], Deviations]
    ) -> dict[int, Deviations]:
        """Return this rank's share of the replays, by number; the first is not perturbed."""
        eps = torch.finfo(self.options.dtype).eps
        own = range(rank.rank, 1 + request.options.replays, rank.topology.world_size)
        return {replay: replayed(eps if replay else 0.0, request.options.seed * 1000 + replay) for replay in own}

    def _tolerance(self, rank: CommunicatingRank, request: Request, measured: Mapping[int, Deviations]) -> Tolerance:
        everyone: list[Deviations] = list(rank.gather(largest_deviations(list(measured.values()))))
        scalar_eps = torch.finfo(torch.promote_types(self.options.dtype, torch.float32)).eps
        return Tolerance(scalar_eps, request.options.replays, largest_deviations(everyone))
