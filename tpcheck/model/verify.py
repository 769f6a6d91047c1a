"""`verify` and `verify_family`: train a sharded model beside the unsharded one and compare them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

from tpcheck.core.check_names import RESUME_CHECK, need_steps
from tpcheck.core.environment import package_versions
from tpcheck.core.errors import COLLECTIVES_DIFFER, BackendError, InternalError, RankFailure, TpcheckError, UsageError
from tpcheck.core.findings import INTERNAL_ERROR, Verdict
from tpcheck.core.phases import phases_of_ranks
from tpcheck.core.topology import Topology
from tpcheck.model.options import (
    DEFAULTS,
    FamilyKeywords,
    OptionKeywords,
    RankAnswer,
    Request,
    RunOptions,
    expand_options,
    require_valid,
)
from tpcheck.model.preload import preload_of
from tpcheck.model.targets import resolve
from tpcheck.numerics.verdict import forbids_training, verdict
from tpcheck.report.report import Report
from tpcheck.world.attach import attach, collectives_checked, exchange_through_store, is_launched, leave_after
from tpcheck.world.world import World, spawn

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

    from tpcheck.backends.interface import Backend
    from tpcheck.core.placement import Placement
    from tpcheck.model.options import BatchSource
    from tpcheck.numerics.tolerance import Tolerance
    from tpcheck.world.rank import Rank

LayoutSource: TypeAlias = "Mapping[str, Placement] | Callable[[str, tuple[int, ...]], Placement | None] | None"

_RETRY_TIMEOUT = 60.0
_STORE_LIMIT = 30.0  # ranks that torch's check has stopped raise together, but may be slow to come
_WITHOUT_CHECK = (
    "If the sizes are meant (gloo takes a scalar for a tensor of one element), start the ranks with "
    "TORCH_DISTRIBUTED_DEBUG=OFF: torch then checks nothing."
)
_WAITING = "OpType=BARRIER"  # in the message of torch's check, where a rank has come to the end of a pass


@expand_options(OptionKeywords)
def verify(
    build: Callable[[], nn.Module],
    batch: BatchSource = None,
    *,
    topology: Topology,
    backend: str | Backend = DEFAULTS.backend,
    dtype: str = DEFAULTS.dtype,
    zero_stage: int = DEFAULTS.zero_stage,
    shard: Callable[[nn.Module, Any], nn.Module | None] | None = None,
    layout: LayoutSource = None,
    **options: Unpack[OptionKeywords],
) -> Report:
    """Shard the model that `build` returns, train it beside the unsharded one, and compare.

    Under torchrun, srun or mpirun the launcher's ranks are used; elsewhere ranks are spawned on this machine.

    Args:
        build: Returns the unsharded model; called on every rank under the same seed. The model returns its loss.
            Parameters that are constant (zero biases, unit norms) are drawn away from their constants, and dropout is
            switched off, on both sides.
        batch: The whole batch as a dict of tensors (cut over DP along the first dim), a callable
            (rank coordinate, step) -> dict, or None for synthetic tokens from `model.config`.
        {options}
        shard: A function that shards, in place of a backend: called on every rank with the unsharded model and its
            `Rank`, it shards in place or returns a module whose parameters have the same names.
        layout: For `shard`: `tpcheck.placement` placements by pattern of parameter names, or a function
            (name, shape) -> placement. A parameter that it does not name is whole on every rank; DTensors know theirs.

    Raises:
        UsageError: An argument is wrong, or the model or batch cannot be used.

    Example:
        >>> report = tpcheck.verify(build_my_model, topology=tpcheck.Topology(tp=2))  # doctest: +SKIP
        >>> report.raise_if_failed()  # doctest: +SKIP
    """
    if shard is not None or layout is not None:
        backend = _custom_backend(shard, layout)
    run_options = RunOptions.of(
        topology=topology, backend=backend, dtype=dtype, zero_stage=zero_stage, batch=batch, **options
    )
    request = Request(build, run_options)
    require_valid(request)
    return run(request, {"model": getattr(build, "__name__", "model"), **run_options.subject()}, again=None)


@expand_options(FamilyKeywords)
def verify_family(
    family: str,
    *,
    topology: Topology,
    backend: str | Backend = DEFAULTS.backend,
    dtype: str = DEFAULTS.dtype,
    zero_stage: int = DEFAULTS.zero_stage,
    **options: Unpack[FamilyKeywords],
) -> Report:
    """Verify a small random model of a transformers model type, such as `llama`, or of a configuration.

    Args:
        family: A language model type of the installed transformers; a folder of transformers, its config.json, or a
            hub id that is in the local cache, whose configuration is made small; `file.py:function` or
            `package.module:function`, which makes the model.
        {options}

    Raises:
        UsageError: No such family, folder, function or setting, or an argument is wrong.

    Example:
        >>> report = tpcheck.verify_family("llama", topology=tpcheck.Topology(tp=2))  # doctest: +SKIP
    """
    run_options = RunOptions.of(topology=topology, backend=backend, dtype=dtype, zero_stage=zero_stage, **options)
    target = resolve(family, run_options)
    request = Request(target.build, run_options, spread_weights=target.spread_weights)
    require_valid(request)
    return run(request, target.subject, again=run_options.command(family), notes=target.notes)


def run(
    request: Request,
    subject: Mapping[str, Any],
    again: str | None,
    world: World | None = None,
    notes: tuple[str, ...] = (),
    on_tolerance: Callable[[Tolerance], None] | None = None,
) -> Report:
    """Run the request on the launcher's ranks or on spawned ones, and return the report.

    Args:
        subject: The subject of the report.
        again: The command that repeats the run, if there is one.
        world: A world of the request's topology, in place of a new one.
        notes: What of the user's model took no part.
        on_tolerance: Called with what rounding does to the training, where that was measured.
    """
    start = time.monotonic()
    request = request if on_tolerance is None else replace(request, keeps_tolerance=True)
    try:
        if is_launched():
            answers = _launched_answers(request)
        else:
            answers = _spawned_answers(request) if world is None else _answers_of_world(request, world)
        groups = [answer.group for answer in answers if answer.group is not None]
        if RESUME_CHECK in request.options.check_names and not any(map(forbids_training, groups)):
            from tpcheck.model.resuming import cannot_resume, verify_resume

            resumed = cannot_resume() if is_launched() else verify_resume(request, answers[0].tolerance)
            groups[0] = replace(groups[0], answers=(*groups[0].answers, resumed))
    except (RankFailure, BackendError, InternalError) as failure:
        return Report(replace(_error_verdict(failure, subject, time.monotonic() - start), notes=notes))
    if on_tolerance is not None and answers[0].tolerance is not None:
        on_tolerance(answers[0].tolerance)
    return Report(
        verdict(
            groups,
            steps=request.options.steps if need_steps(request.options.check_names) else 0,
            subject=subject,
            environment=package_versions() | dict(answers[0].versions),
            again=again,
            seconds=time.monotonic() - start,
            notes=(*notes, *answers[0].notes),
        )
    )


def _verify_on_rank(rank: Rank, request: Request) -> RankAnswer:
    """Do the work of one rank, which loads torch: the process that spawns ranks does without."""
    from tpcheck.model.rank_run import verify_on_rank

    return verify_on_rank(rank, request)


def _launched_answers(request: Request) -> tuple[RankAnswer, ...]:
    """Run the request on the launcher's ranks. An error of tpcheck's own, as one rank may have alone, ends all.

    torch checks every collective, as on spawned ranks, unless the launcher's environment says otherwise, or the
    caller has made a default group without: ranks that part would wait for each other until the group's timeout.
    """
    topology = request.options.topology
    answer: RankAnswer | InternalError
    with collectives_checked():
        rank = attach(topology, device=request.options.device)
        name = rank.gather(uuid4().hex)[0]  # of this call, on all ranks
        try:
            answer = _verify_on_rank(rank, request)
        except InternalError as error:
            answer = error
        except BackendError as error:
            raise _crash_of_launched(rank, name, error) from error
        answers: tuple[RankAnswer | InternalError, ...] = rank.gather(answer)
    for of_rank in answers:
        if isinstance(of_rank, InternalError):
            raise of_rank
    return tuple(of_rank for of_rank in answers if not isinstance(of_rank, InternalError))


def _crash_of_launched(rank: Rank, name: str, error: BackendError) -> BackendError:
    """Return what has crashed on a launcher's rank, by what the others have done, as far as they have crashed, too.

    The ranks may have parted, so that no collective is possible. Where rank 0 waits for this one, which ends it, this
    one writes the error.

    Args:
        name: Of this call, the same on all ranks.
    """
    details = (getattr(error, "tpcheck_details", None),)
    crashed = exchange_through_store(rank, details, name=name, limit_s=_STORE_LIMIT)
    progress = {other: details for other, (details,) in crashed.items() if details is not None}
    explained: BackendError | None = None
    if COLLECTIVES_DIFFER in str(error):
        explained, unlike = _explanations(progress, str(error), rank.topology)
        if explained is None and unlike is not None:
            explained = BackendError(f"{unlike}\n{_WITHOUT_CHECK}")
    if 0 in crashed:
        leave_after(rank, first=0, name=name, limit_s=_STORE_LIMIT)
    elif rank.rank == min(crashed):
        sys.stderr.write(f"tpcheck, on rank {rank.rank}: {explained or error}\n")
    return explained or error


def _spawned_answers(request: Request) -> tuple[RankAnswer, ...]:
    """Run the request on spawned ranks.

    torch checks every collective for shapes and dtypes that differ between ranks, where others would hang or crash. The
    check is stricter than gloo, which accepts a scalar for a tensor of one element: what fails it is run again without.
    """
    options = request.options
    topology, timeout, device = options.topology, options.timeout, options.device
    try:
        with (
            phases_of_ranks() as env,
            spawn(topology, timeout=timeout, device=device, also=preload_of(request), env=env) as world,
        ):
            return world.run(_verify_on_rank, request)
    except RankFailure as failure:
        if COLLECTIVES_DIFFER not in str(failure.exception):
            raise
        parted, unlike = _explanations_of(failure, topology)
        if parted is not None:
            raise parted from failure
        if isinstance(failure.exception, InternalError) or _WAITING in str(failure.exception):
            raise  # the ranks have parted: without checks they would hang
        try:
            without_checks, limit = {"TORCH_DISTRIBUTED_DEBUG": "OFF"}, min(timeout, _RETRY_TIMEOUT)
            with spawn(topology, timeout=limit, device=device, env=without_checks) as world:
                return world.run(_verify_on_rank, request)
        except RankFailure:
            raise (unlike or failure) from None


def _answers_of_world(request: Request, world: World) -> tuple[RankAnswer, ...]:
    try:
        return world.run(_verify_on_rank, request)
    except RankFailure as failure:
        if COLLECTIVES_DIFFER not in str(failure.exception):
            raise
        parted, unlike = _explanations_of(failure, request.options.topology)
        raise (parted or unlike or failure) from failure


def _explanations_of(failure: RankFailure, topology: Topology) -> tuple[BackendError | None, BackendError | None]:
    """Return the `_explanations` of ranks that torch's check has stopped."""
    progress = {outcome.rank: outcome.details for outcome in failure.outcomes if outcome.details is not None}
    return _explanations(progress, str(failure.exception), topology)


def _explanations(
    progress: Mapping[int, Any], message: str, topology: Topology
) -> tuple[BackendError | None, BackendError | None]:
    """Return the errors by what the ranks have done (`RankProgress`), with the message of torch's check.

    The first says what ranks have issued that others have not, the second which collective all have issued, with
    tensors that do not fit; None where that is not so, or unknown.
    """
    from tpcheck.model.blame import explain_parting, explain_tensors

    groups = [*topology.groups("tp"), *topology.groups("dp")]
    by_torch = message[message.index(COLLECTIVES_DIFFER) :]
    texts = (explain_parting(progress, groups), explain_tensors(progress, groups))
    parted, unlike = (None if text is None else BackendError(f"{text}.\ntorch's message: {by_torch}") for text in texts)
    return parted, unlike


def _error_verdict(
    failure: RankFailure | BackendError | InternalError, subject: Mapping[str, Any], seconds: float
) -> Verdict:
    """Return the verdict `error`, with the message of a backend that raised, or the traceback where tpcheck did.

    Raises:
        TpcheckError: The ranks were asked for something that cannot be done; nothing crashed.
    """
    cause = failure.exception if isinstance(failure, RankFailure) else failure
    if isinstance(cause, InternalError):
        message = f"{INTERNAL_ERROR}\n{cause}"
        return Verdict("error", subject, package_versions(), seconds=seconds, message=message)
    if isinstance(cause, TpcheckError) and not isinstance(cause, BackendError):
        raise cause from failure
    message = str(cause) if isinstance(cause, BackendError) else str(failure)
    if isinstance(failure, RankFailure) and cause is not failure:
        message += _on_some_ranks(failure)
    return Verdict("error", subject, package_versions(), seconds=seconds, message=message)


def _on_some_ranks(failure: RankFailure) -> str:
    """Return which ranks have raised the exception, where others have been stopped because of it; else nothing."""
    first = failure.outcomes[failure.first]
    raised = [
        each.rank for each in failure.outcomes if (each.error_type, each.error) == (first.error_type, first.error)
    ]
    stopped = [each.rank for each in failure.outcomes if each.state == "stopped"]
    if not stopped:
        return ""
    by, others = (f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for ranks in (raised, stopped))
    return f"\nraised by {by}; {others} had not raised it when stopped because of it"


def _custom_backend(shard: Callable[..., Any] | None, layout: LayoutSource) -> Backend:
    """Return the backend that shards with the caller's function.

    Raises:
        UsageError: `shard` or `layout` has the wrong type.
    """
    from tpcheck.backends.registry import load_backend

    if not callable(shard):
        raise UsageError("shard", shard, "a callable (model, rank) that shards in place or returns a module")
    if layout is not None and not callable(layout) and not isinstance(layout, Mapping):
        raise UsageError("layout", layout, "a dict of placements by pattern of parameter names, a callable, or None")
    configured: Any = load_backend("custom")
    backend: Backend = replace(configured, shard_model=shard, layout=layout)
    return backend
