"""Verifies a model: arguments checked, ranks found, answers turned into a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from tpcheck.again import verify_command
from tpcheck.environment import package_versions
from tpcheck.errors import BackendError, RankFailure, TpcheckError, UsageError
from tpcheck.records import Verdict
from tpcheck.report import Report
from tpcheck.topology import Topology
from tpcheck.world import attach, spawn
from tpcheck.world.attach import is_launched

if TYPE_CHECKING:
    from torch import nn

    from tpcheck.adapters import Backend
    from tpcheck.families.tokens import Tokens
    from tpcheck.placement import Placement
    from tpcheck.verification import RankAnswer, Request
    from tpcheck.verification.request import BatchSource

LayoutSource: TypeAlias = "Mapping[str, Placement] | Callable[[str, tuple[int, ...]], Placement | None] | None"
DTYPES = ("float64", "float32", "bfloat16")
ZERO_STAGES = (0, 1, 2, 3)
TIMEOUT = 600.0
_TRY_AGAIN = 60.0
_COLLECTIVES_DIFFER = "Detected mismatch between collectives"  # of torch's ProcessGroupWrapper


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
        timeout: Seconds until a run that hangs is ended.
        shard: Code of your own in place of a backend: called on every rank with the unsharded model and its `Rank`,
            it shards in place or returns a module whose parameters bear the same names.
        layout: For `shard`: `tpcheck.placement` placements by pattern of parameter names, or a function
            (name, shape) -> placement. What it does not name lies whole on every rank; DTensors tell themselves.

    Raises:
        UsageError: An argument is wrong, or the model or batch cannot be used.

    Example:
        >>> report = tpcheck.verify(build_my_model, topology=tpcheck.Topology(tp=2))  # doctest: +SKIP
        >>> report.raise_if_failed()  # doctest: +SKIP
    """
    from tpcheck.verification import Request

    request = Request(
        build=build,
        batch=batch,
        backend=backend if shard is None and layout is None else _custom(shard, layout),
        dtype=dtype,
        steps=steps,
        zero_stage=zero_stage,
        config=_mapping("config", config),
        checks=_names(checks),
        seed=seed,
        ignore_plan=ignore_plan,
    )
    _require_valid(request, topology)
    subject = {"model": getattr(build, "__name__", "model"), **_options(request, topology)}
    return _run(request, topology, _Presentation(subject, again=None), timeout)


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
    from tpcheck.verification import Request

    tokens = Tokens.parse(batch) if isinstance(batch, str) else batch
    request = Request(
        build=partial(small_model, family, _mapping("settings", settings)),
        batch=tokens,
        backend=backend,
        dtype=dtype,
        steps=steps,
        zero_stage=zero_stage,
        config=_mapping("config", config),
        checks=_names(checks),
        seed=seed,
        ignore_plan=ignore_plan,
        spread_weights=True,
    )
    _require_valid(request, topology)
    subject = {
        "family": family,
        **_options(request, topology),
        "settings": dict(settings or {}),
        **({} if tokens is None or tokens == Tokens() else {"batch": str(tokens)}),
    }
    return _run(request, topology, _Presentation(subject, again=verify_command(subject)), timeout)


@dataclass(frozen=True, slots=True)
class _Presentation:
    """What a report says of a run beside its findings."""

    subject: Mapping[str, Any]
    again: str | None


def _run(request: Request, topology: Topology, shown: _Presentation, timeout: float) -> Report:
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
        with spawn(topology, timeout=timeout) as world:
            return world.run(verify_on_rank, request)
    except RankFailure as failure:
        if _COLLECTIVES_DIFFER not in str(failure.exception):
            raise
        try:
            with spawn(topology, timeout=min(timeout, _TRY_AGAIN), env={"TORCH_DISTRIBUTED_DEBUG": "OFF"}) as world:
                return world.run(verify_on_rank, request)
        except RankFailure:
            raise failure from None


def _crashed(failure: RankFailure | BackendError, shown: _Presentation, seconds: float) -> Verdict:
    """Return the verdict `error`, with the backend's own message where a backend raised.

    Raises:
        TpcheckError: The ranks were asked for something that cannot be done; nothing crashed.
    """
    cause = failure.exception if isinstance(failure, RankFailure) else failure
    if isinstance(cause, TpcheckError) and not isinstance(cause, BackendError):
        raise cause from failure
    message = str(cause) if isinstance(cause, BackendError) else str(failure)
    return Verdict("error", shown.subject, package_versions(), seconds=seconds, message=message)


def _require_valid(request: Request, topology: Topology) -> None:
    from tpcheck.adapters import backend_names
    from tpcheck.families.tokens import Tokens

    if not isinstance(topology, Topology):
        raise UsageError("topology", topology, "a tpcheck.Topology")

    is_module = hasattr(request.build, "named_parameters") and not isinstance(request.build, type)
    if not callable(request.build) or is_module:  # a module is callable, too
        raise UsageError(
            "build", type(request.build).__name__, "a callable that makes and returns the unsharded torch.nn.Module"
        )
    is_backend = hasattr(request.backend, "shard") or request.backend in backend_names()
    if not is_backend:
        raise UsageError("backend", request.backend, [*backend_names(), "an object like tpcheck.adapters.Backend"])
    if request.dtype not in DTYPES:
        raise UsageError("dtype", request.dtype, DTYPES)
    if request.zero_stage not in ZERO_STAGES:
        raise UsageError("zero_stage", request.zero_stage, ZERO_STAGES)
    for name, value, least in (("steps", request.steps, 1), ("seed", request.seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise UsageError(name, value, f"an integer from {least} to {2**31 - 1}")
    if request.batch is not None and not callable(request.batch) and not isinstance(request.batch, (Mapping, Tokens)):
        raise UsageError("batch", type(request.batch).__name__, "a dict of tensors, a callable or None")
    known = (*_default_checks(), _checkpoint_check())
    unknown = [name for name in request.checks if name not in known]
    if unknown or not request.checks:
        raise UsageError("checks", unknown or (), known)


def _custom(shard: Callable[..., Any] | None, layout: LayoutSource) -> Backend:
    """Return the backend that shards by the user's own code.

    Raises:
        UsageError: It is no code, or no layout.
    """
    from tpcheck.adapters import load_backend

    if not callable(shard):
        raise UsageError("shard", shard, "a callable (model, rank) that shards in place or returns a module")
    if layout is not None and not callable(layout) and not isinstance(layout, Mapping):
        raise UsageError("layout", layout, "a dict of placements by pattern of parameter names, a callable, or None")
    configured: Any = load_backend("custom")
    backend: Backend = replace(configured, shard_model=shard, layout=layout)
    return backend


def _mapping(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UsageError(name, value, "a dict, or None")
    return dict(value or {})


def _names(checks: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(checks, str):
        raise UsageError("checks", checks, "a list of names")
    return _default_checks() if checks is None else tuple(checks)


def _default_checks() -> tuple[str, ...]:
    from tpcheck.checks import CHECK_NAMES

    return CHECK_NAMES


def _checkpoint_check() -> str:
    from tpcheck.checks import CHECKPOINT_CHECK

    return CHECKPOINT_CHECK


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
        **({} if request.checks == _default_checks() else {"checks": list(request.checks)}),
    }
