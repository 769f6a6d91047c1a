"""Runs a verification on ranks, and turns their answers, or their crash, into a report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpcheck.environment import package_versions
from tpcheck.errors import BackendError, RankFailure, TpcheckError
from tpcheck.records import Verdict
from tpcheck.report import Report
from tpcheck.topology import Topology
from tpcheck.world import attach, spawn
from tpcheck.world.attach import is_launched
from tpcheck.world.preload import OF_ZERO

if TYPE_CHECKING:
    from tpcheck.verification import RankAnswer, Request

_TRY_AGAIN = 60.0
_COLLECTIVES_DIFFER = "Detected mismatch between collectives"  # of torch's ProcessGroupWrapper


@dataclass(frozen=True, slots=True)
class Presentation:
    """What a report says of a run beside its findings."""

    subject: Mapping[str, Any]
    again: str | None


def run(request: Request, topology: Topology, shown: Presentation, timeout: float) -> Report:
    from tpcheck.verification import verify_on_rank
    from tpcheck.verification.verdict import verdict

    start = time.monotonic()
    try:
        if is_launched():
            rank = attach(topology)
            answers: tuple[RankAnswer, ...] = rank.gather(verify_on_rank(rank, request))
        else:
            answers = _spawned_answers(request, topology, timeout)
    except (RankFailure, BackendError) as failure:
        return Report(_crashed(failure, shown, time.monotonic() - start))
    return Report(
        verdict(
            [answer.group for answer in answers if answer.group is not None],
            steps=request.steps,
            subject=shown.subject,
            environment=package_versions() | dict(answers[0].versions),
            again=shown.again,
            seconds=time.monotonic() - start,
        )
    )


def _spawned_answers(request: Request, topology: Topology, timeout: float) -> tuple[RankAnswer, ...]:
    """Run the request on ranks of its own.

    They check every collective for shapes and dtypes that do not match, where others would hang or crash. The check is
    stricter than gloo, which takes a scalar for a tensor of one element: what it objects to is tried again without it.
    """
    from tpcheck.verification import verify_on_rank

    try:
        with spawn(topology, timeout=timeout, also=OF_ZERO if request.zero_stage else ()) as world:
            return world.run(verify_on_rank, request)
    except RankFailure as failure:
        if _COLLECTIVES_DIFFER not in str(failure.exception):
            raise
        try:
            with spawn(topology, timeout=min(timeout, _TRY_AGAIN), env={"TORCH_DISTRIBUTED_DEBUG": "OFF"}) as world:
                return world.run(verify_on_rank, request)
        except RankFailure:
            raise failure from None


def _crashed(failure: RankFailure | BackendError, shown: Presentation, seconds: float) -> Verdict:
    """Return the verdict `error`, with the backend's own message where a backend raised.

    Raises:
        TpcheckError: The ranks were asked for something that cannot be done; nothing crashed.
    """
    cause = failure.exception if isinstance(failure, RankFailure) else failure
    if isinstance(cause, TpcheckError) and not isinstance(cause, BackendError):
        raise cause from failure
    message = str(cause) if isinstance(cause, BackendError) else str(failure)
    return Verdict("error", shown.subject, package_versions(), seconds=seconds, message=message)
