"""What the backends of this package do not take of a run's options. Loads no torch, as checks of usage do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tpcheck.core.errors import UsageError


class Limited(Protocol):
    """Options of a run, or those that a backend trains with."""

    @property
    def zero_stage(self) -> int: ...

    @property
    def ignore_plan(self) -> bool: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a backend.

    Attributes:
        zero_stage: Why it takes no ZeRO stage but 0; empty where it does.
        ignore_plan: Why it cannot drop a plan, or what to do in place of that; empty where it can.
        config: The names of its settings; None where its library says.
        no_config: Why it has no settings.
    """

    zero_stage: str = ""
    ignore_plan: str = ""
    config: tuple[str, ...] | None = None
    no_config: str = ""


_LIMITS: Mapping[str, Limits] = {
    "custom": Limits(
        zero_stage="your own code decides what is sharded over dp", no_config="your own code has its own settings"
    ),
    "dtensor": Limits(
        zero_stage="above dp=1 fully_shard wraps the model",
        ignore_plan="torch has no heuristics; give a plan as config.plan",
        config=("plan", "loss_parallel"),
    ),
    "megatron": Limits(
        zero_stage="Megatron's is use_distributed_optimizer, in config",
        ignore_plan="Megatron has no plans; its layers shard themselves",
    ),
    "transformers": Limits(
        zero_stage="transformers shards over dp with FSDP2, not ZeRO",
        ignore_plan="transformers has no heuristics; give a plan of your own as config.tp_plan",
    ),
}


def require_within_limits(backend: str, options: Limited) -> None:
    """Raise UsageError if a backend of this package does not take these options, whatever the model."""
    limits = _LIMITS.get(backend, Limits())
    if limits.zero_stage and options.zero_stage:
        raise UsageError("zero_stage", options.zero_stage, f"0: {limits.zero_stage}")
    if limits.ignore_plan and options.ignore_plan:
        raise UsageError("ignore_plan", True, f"False: {limits.ignore_plan}")
    if limits.no_config and options.config:
        raise UsageError("config", dict(options.config), f"none: {limits.no_config}")
    known = limits.config
    for name in options.config:
        if known is not None and name not in known:
            raise UsageError("config", name, known)
