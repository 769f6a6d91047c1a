"""Verifies a model: of the user's own, or a small one of a family."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tpcheck.core.environment import package_versions
from tpcheck.core.errors import BackendError, RankFailure, TpcheckError
from tpcheck.core.findings import Verdict
from tpcheck.core.reproduce import verify_command
from tpcheck.core.topology import Topology
from tpcheck.model.arguments import LayoutSource, check_names, custom_backend, default_checks, mapping, require_valid
from tpcheck.numerics.tolerance import NUM_REPLAYS
from tpcheck.report.report import Report
from tpcheck.world.attach import attach, is_launched
from tpcheck.world.preload import ZERO_PRELOAD
from tpcheck.world.world import spawn

if TYPE_CHECKING:
    from torch import nn

    from tpcheck.backends.interface import Backend
    from tpcheck.families.tokens import Tokens
    from tpcheck.model.rank_run import RankAnswer
    from tpcheck.model.request import BatchSource, Request


_TRY_AGAIN = 60.0
_COLLECTIVES_DIFFER = "Detected mismatch between collectives"  # of torch's ProcessGroupWrapper


@dataclass(frozen=True, slots=True)
class Presentation:
    """What a report says of a run beside its findings."""

    subject: Mapping[str, Any]
    again: str | None


def run(request: Request, topology: Topology, shown: Presentation, timeout: float) -> Report:
    from tpcheck.model.rank_run import verify_on_rank
    from tpcheck.numerics.answer import verdict

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
    from tpcheck.model.rank_run import verify_on_rank

    try:
        with spawn(topology, timeout=timeout, extra_preload=ZERO_PRELOAD if request.zero_stage else ()) as world:
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


TIMEOUT = 600.0


def verify(
    build: Callable[[], nn.Module],
    batch: BatchSource = None,
    *,
    topology: Topology,
    backend: str | Backend = "deepspeed",
    dtype: str = "float64",
    steps: int = 2,
    zero_stage: int = 0,
    config: Mapping[str, Any] | None = None,
    checks: Sequence[str] | None = None,
    seed: int = 0,
    ignore_plan: bool = False,
    replays: int = NUM_REPLAYS,
    timeout: float = TIMEOUT,
    shard: Callable[[nn.Module, Any], nn.Module | None] | None = None,
    layout: LayoutSource = None,
) -> Report:
    """Shard the model that `build` returns, train it beside the unsharded one, and compare.

    Under torchrun or srun the launcher's ranks are used; elsewhere ranks are spawned on this machine.

    Args:
        build: Returns the unsharded model; called on every rank under the same seed. The model returns its loss.
            Parameters that are constant (zero biases, unit norms) are drawn away from their constants, and dropout is
            switched off, on both sides.
        batch: The whole batch as a dict of tensors (cut over DP along the first dim), a callable
            (rank coordinate, step) -> dict, or None for synthetic tokens from `model.config`.
        topology: Sizes of the parallel axes.
        backend: What shards the model: `deepspeed`, the name of another installed backend, or an object with the
            methods of `tpcheck.adapters.Backend`.
        dtype: `float64` (tells bugs from rounding best), `float32` or `bfloat16`.
        steps: Training steps; the comparison ends after the first one that differs.
        zero_stage: ZeRO stage, 0 to 3.
        config: Backend configuration merged over tpcheck's own; for DeepSpeed, its config dict.
        checks: Names of the checks to run; None for all but `checkpoint_matches_reference`, which saves the model in
            each way that the backend has, reads it back, and compares, before the first step and after the last.
        seed: Seed of weights, batches and replays.
        ignore_plan: Drop the model's own tp_plan, so that the backend's heuristics shard it.
        replays: Perturbed replays of the reference that measure what is allowed; fewer are quicker, and may allow less.
        timeout: Seconds until a run that hangs is ended.
        shard: Code of your own in place of a backend: called on every rank with the unsharded model and its `Rank`,
            it shards in place or returns a module whose parameters bear the same names.
        layout: For `shard`: `tpcheck.core.placement` placements by pattern of parameter names, or a function
            (name, shape) -> placement. What it does not name lies whole on every rank; DTensors tell themselves.

    Raises:
        UsageError: An argument is wrong, or the model or batch cannot be used.

    Example:
        >>> report = tpcheck.verify(build_my_model, topology=tpcheck.Topology(tp=2))  # doctest: +SKIP
        >>> report.raise_if_failed()  # doctest: +SKIP
    """
    from tpcheck.model.request import Request

    request = Request(
        build=build,
        batch=batch,
        backend=backend if shard is None and layout is None else custom_backend(shard, layout),
        dtype=dtype,
        steps=steps,
        zero_stage=zero_stage,
        config=mapping("config", config),
        checks=check_names(checks),
        seed=seed,
        ignore_plan=ignore_plan,
        num_replays=replays,
    )
    require_valid(request, topology)
    subject = {"model": getattr(build, "__name__", "model"), **_options(request, topology)}
    return run(request, topology, Presentation(subject, again=None), timeout)


def verify_family(
    family: str,
    *,
    topology: Topology,
    backend: str | Backend = "deepspeed",
    dtype: str = "float64",
    steps: int = 2,
    zero_stage: int = 0,
    config: Mapping[str, Any] | None = None,
    checks: Sequence[str] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    batch: Tokens | str | None = None,
    ignore_plan: bool = False,
    replays: int = NUM_REPLAYS,
    timeout: float = TIMEOUT,
) -> Report:
    """Verify a small random model of a transformers model type, such as `llama`.

    Args:
        family: A causal language model type of the installed transformers.
        settings: Changes to the model's configuration, such as `{"qk_layernorm": True}`.
        batch: What the tokens of a DP rank look like, such as `"3x7,padded,strided"`: three samples of seven tokens,
            some of them padding, in memory that is not contiguous. None for `"2x16"`.

    The other arguments are those of `verify`.

    Raises:
        UsageError: No such family or setting, or an argument is wrong.

    Example:
        >>> report = tpcheck.verify_family("llama", topology=tpcheck.Topology(tp=2))  # doctest: +SKIP
    """
    from tpcheck.families.build import small_model
    from tpcheck.families.tokens import Tokens
    from tpcheck.model.request import Request

    tokens = Tokens.parse(batch) if isinstance(batch, str) else batch
    request = Request(
        build=partial(small_model, family, mapping("settings", settings)),
        batch=tokens,
        backend=backend,
        dtype=dtype,
        steps=steps,
        zero_stage=zero_stage,
        config=mapping("config", config),
        checks=check_names(checks),
        seed=seed,
        ignore_plan=ignore_plan,
        num_replays=replays,
        spread_weights=True,
    )
    require_valid(request, topology)
    subject = {
        "family": family,
        **_options(request, topology),
        "settings": dict(settings or {}),
        **({} if tokens is None or tokens == Tokens() else {"batch": str(tokens)}),
    }
    return run(request, topology, Presentation(subject, again=verify_command(subject)), timeout)


def _options(request: Request, topology: Topology) -> dict[str, Any]:
    return {
        "backend": request.backend if isinstance(request.backend, str) else request.backend.name,
        "tp": topology.tp,
        "dp": topology.dp,
        "zero": request.zero_stage,
        "dtype": request.dtype,
        "steps": request.steps,
        "seed": request.seed,
        "config": dict(request.config),
        "ignore_plan": request.ignore_plan,
        **({} if request.checks == default_checks() else {"checks": list(request.checks)}),
    }
