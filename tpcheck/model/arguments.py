"""Checks the arguments of a verification: what is wrong, and what would be accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology

if TYPE_CHECKING:
    from tpcheck.backends.interface import Backend
    from tpcheck.core.placement import Placement
    from tpcheck.model.request import Request

LayoutSource: TypeAlias = "Mapping[str, Placement] | Callable[[str, tuple[int, ...]], Placement | None] | None"
DTYPES = ("float64", "float32", "bfloat16")
ZERO_STAGES = (0, 1, 2, 3)


def require_valid(request: Request, topology: Topology) -> None:
    from tpcheck.backends.registry import backend_names
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
    for name, value, least in (
        ("steps", request.steps, 1),
        ("seed", request.seed, 0),
        ("replays", request.num_replays, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise UsageError(name, value, f"an integer from {least} to {2**31 - 1}")
    if request.batch is not None and not callable(request.batch) and not isinstance(request.batch, (Mapping, Tokens)):
        raise UsageError("batch", type(request.batch).__name__, "a dict of tensors, a callable or None")
    known = (*default_checks(), _checkpoint_check())
    unknown = [name for name in request.checks if name not in known]
    if unknown or not request.checks:
        raise UsageError("checks", unknown or (), known)


def custom_backend(shard: Callable[..., Any] | None, layout: LayoutSource) -> Backend:
    """Return the backend that shards by the user's own code.

    Raises:
        UsageError: It is no code, or no layout.
    """
    from tpcheck.backends.registry import load_backend

    if not callable(shard):
        raise UsageError("shard", shard, "a callable (model, rank) that shards in place or returns a module")
    if layout is not None and not callable(layout) and not isinstance(layout, Mapping):
        raise UsageError("layout", layout, "a dict of placements by pattern of parameter names, a callable, or None")
    configured: Any = load_backend("custom")
    backend: Backend = replace(configured, shard_model=shard, layout=layout)
    return backend


def mapping(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UsageError(name, value, "a dict, or None")
    return dict(value or {})


def check_names(checks: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(checks, str):
        raise UsageError("checks", checks, "a list of names")
    return default_checks() if checks is None else tuple(checks)


def default_checks() -> tuple[str, ...]:
    from tpcheck.numerics.checks import CHECK_NAMES

    return CHECK_NAMES


def _checkpoint_check() -> str:
    from tpcheck.numerics.checks import CHECKPOINT_CHECK

    return CHECKPOINT_CHECK
