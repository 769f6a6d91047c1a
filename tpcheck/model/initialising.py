"""Makes models from scratch, with and without tensor parallelism, under many seeds, and compares what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import nn

from tpcheck.backends.initialisation import NotInitialised, random_dtensors_on_cpu
from tpcheck.backends.interface import Backend, InitialisesModels, TrainingOptions, WayToInitialise
from tpcheck.backends.layout import Layout
from tpcheck.core.check_names import INITIALISATION_CHECK
from tpcheck.core.digests import digest
from tpcheck.core.errors import BackendError, UsageError
from tpcheck.core.generators import generators_kept, seed_everything
from tpcheck.model.blame import blame_backend
from tpcheck.model.options import Request
from tpcheck.model.reference import CommunicatingRank
from tpcheck.numerics.checks.initialisation import (
    NUM_DRAWS,
    Draw,
    DrawnModel,
    DrawnParameter,
    compare_initialisation,
)
from tpcheck.numerics.evidence import WayOutcome
from tpcheck.numerics.verdict import CheckAnswer

T = TypeVar("T")

_OF_UNSHARDED = 1_000_003
"""Added to the seeds of the unsharded models: draws of the two sides have to be independent."""


def verify_initialisation(
    rank: CommunicatingRank, request: Request, backend: Backend, options: TrainingOptions
) -> CheckAnswer:
    """Make models in each way of the backend, and compare them with the unsharded one. Collective over the world.

    Raises:
        BackendError: The backend has ways to make a model from scratch, and each of them crashed.
    """
    answer = CheckAnswer(INITIALISATION_CHECK, -1, {}, (), {})
    not_compared: dict[str, str] = {}
    crashed: list[str] = []
    if not isinstance(backend, InitialisesModels):
        reason = f"the backend {backend.name} offers no way to make a model from scratch"
        return answer.with_way(WayOutcome(not_compared={"initialisation": reason}))
    stand_in = random_dtensors_on_cpu if rank.device.type == "cpu" else nullcontext
    with generators_kept(), stand_in():
        seed_everything(request.options.seed)
        found = _attempt(rank, backend, lambda: backend.ways_to_initialise(partial(_build, request), rank, options))
        ways: Mapping[str, WayToInitialise] = {} if isinstance(found, _Failure) else found
        if isinstance(found, _Failure):
            not_compared["initialisation"] = found.reason
            crashed += [found.reason] if found.is_crash else []
        for name, way in ways.items():
            drawn = _attempt(rank, backend, partial(_draw, rank, way, request.options.seed, not_compared))
            if isinstance(drawn, _Failure):
                not_compared[name] = drawn.reason
                crashed += [f"{name}: {drawn.reason}"] if drawn.is_crash else []
                continue
            answer = answer.with_way(compare_initialisation(name, rank.topology, rank.gather(drawn)))
    if crashed and not answer.margins:
        raise BackendError("; ".join(crashed))
    return answer.with_way(WayOutcome(not_compared=not_compared))


def _build(request: Request) -> nn.Module:
    model = request.build()
    if not isinstance(model, nn.Module):
        raise UsageError("build", type(model).__name__, "a callable that returns a torch.nn.Module")
    return model


class _Failure:
    """Why a rank could not make a model: a crash, or a way that does not exist for the model."""

    def __init__(self, reason: str, *, is_crash: bool) -> None:
        self.reason = reason
        self.is_crash = is_crash


def _attempt(rank: CommunicatingRank, backend: Backend, function: Callable[[], T]) -> T | _Failure:
    """Return what the function returns, or on all ranks why the first rank that failed did. Collective."""
    failure = result = None
    try:
        with blame_backend(backend, "making a model from scratch"):
            try:
                result = function()
            except NotInitialised as error:
                failure = _Failure(str(error), is_crash=False)
    except BackendError as error:
        failure = _Failure(str(error), is_crash=True)
    failures = [of_rank for of_rank in rank.gather(failure) if of_rank is not None]
    if failures:
        first: _Failure = failures[0]
        return first
    assert result is not None
    return result


def _draw(rank: CommunicatingRank, way: WayToInitialise, seed: int, not_compared: dict[str, str]) -> DrawnModel:
    """Make `NUM_DRAWS` models on each side; return what this rank holds of them. Collective over the world.

    Args:
        not_compared: Grows by the parameters of which it is not known which elements this rank holds.
    """
    tp_rank = rank.topology.coordinate(rank.rank)["tp"]
    layouts: Mapping[str, Layout] = {}
    actual: dict[str, list[Draw]] = {}
    expected: dict[str, list[Draw]] = {}
    repeated: dict[str, tuple[int, int] | None] = {}
    for number in range(NUM_DRAWS):
        seed_everything(seed + number)
        candidate = way.sharded(seed + number)
        layouts = layouts or candidate.layouts()
        names = dict(candidate.module.named_parameters(remove_duplicate=False))
        shards = {name: candidate.parameter(name) for name in names if name in layouts}
        seed_everything(seed + number + _OF_UNSHARDED)
        unsharded = dict(way.unsharded(seed + number + _OF_UNSHARDED).named_parameters(remove_duplicate=False))
        for name, parameter in unsharded.items():
            if name not in shards or tuple(layouts[name].shape) != tuple(parameter.shape):
                not_compared[name] = "it is not known which elements each rank holds"
                continue
            whole = parameter.detach()
            is_real = layouts[name].local(torch.ones_like(whole, dtype=torch.bool), tp_rank)  # not padding
            sides = [part[is_real] for part in (shards[name], layouts[name].local(whole, tp_rank))]
            if not sides[0].numel():
                not_compared[name] = "a rank holds nothing of it"
                continue
            for draws, elements in zip((actual, expected), sides, strict=True):
                draws.setdefault(name, []).append(_described(elements))
            if not number:
                repeated[name] = _repeated_rows(shards[name], layouts[name].local(whole, tp_rank))
    return {
        name: DrawnParameter(
            is_replicated=layouts[name].is_replicated,
            num_elements=prod(layouts[name].local_shapes[tp_rank]),
            actual=tuple(draws),
            expected=tuple(expected[name]),
            repeated_rows=repeated[name],
        )
        for name, draws in actual.items()
    }


def _described(elements: torch.Tensor) -> Draw:
    values = elements.double()
    return Draw(float(values.mean()), float(values.std(correction=0)), digest(elements))


_SHORTEST_ROW = 4  # elements: shorter rows may be equal by chance in 16 bits


def _repeated_rows(actual: torch.Tensor, expected: torch.Tensor) -> tuple[int, int] | None:
    """Return how many rows or columns of each matrix equal an earlier one; None where rows are short."""
    if actual.dim() < 2 or min(actual.shape[0], actual[0].numel()) < _SHORTEST_ROW:
        return None
    rows = [part.detach().flatten(1) for part in (actual, expected)]
    of_rows, of_columns = (
        tuple(len(matrix) - len(torch.unique(matrix, dim=0)) for matrix in matrices)
        for matrices in (rows, [matrix.t() for matrix in rows])
    )
    differing = of_rows if of_rows[0] > of_rows[1] else of_columns
    return differing[0], differing[1]
