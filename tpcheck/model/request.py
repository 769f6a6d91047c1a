"""What a run is asked to do, in a form that travels to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpcheck.backends.interface import Backend
from tpcheck.families.tokens import Tokens
from tpcheck.numerics.tolerance import NUM_REPLAYS

BatchSource = Mapping[str, Any] | Callable[[Mapping[str, int], int], Mapping[str, Any]] | Tokens | None


@dataclass(frozen=True, slots=True)
class Request:
    """One verification.

    Attributes:
        build: Returns the unsharded model; called on every rank under the same seed.
        batch: A dict of tensors (the whole batch, cut over DP), a callable (rank coordinate, step) -> dict, what
            synthetic tokens from the model's configuration look like, or None for the usual ones.
        backend: Name of the backend, or a backend object of the caller's own.
        dtype: Name of the dtype of weights and arithmetic.
        steps: How many training steps.
        zero_stage: ZeRO stage of the backend.
        config: The user's backend configuration.
        checks: Names of the checks to run.
        seed: Seed of weights, batches and replays.
        ignore_plan: Drop the model's own tp_plan.
        spread_weights: Redraw matrices on a scale that makes every path of the model count.
        num_replays: How many perturbed replays measure the tolerance.
    """

    build: Callable[[], Any]
    batch: BatchSource = None
    backend: str | Backend = "deepspeed"
    dtype: str = "float64"
    steps: int = 2
    zero_stage: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    seed: int = 0
    ignore_plan: bool = False
    spread_weights: bool = False
    num_replays: int = NUM_REPLAYS
