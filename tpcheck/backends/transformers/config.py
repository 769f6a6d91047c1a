"""The `DistributedConfig` that a run asks for."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.distributed import DistributedConfig

from tpcheck.backends.protocols import TrainingOptions
from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology


def require_usual(options: TrainingOptions) -> TrainingOptions:
    """Return the options where no version of transformers refuses them.

    Raises:
        UsageError: An option that transformers does not have.
    """
    if options.zero_stage:
        raise UsageError("zero_stage", options.zero_stage, "0: transformers shards over dp with FSDP2, not ZeRO")
    if options.ignore_plan:
        raise UsageError(
            "ignore_plan", True, "False: transformers has no heuristics; give a plan of your own as config.tp_plan"
        )
    return options


def require_supported(options: TrainingOptions) -> TrainingOptions:
    """Return the options where all that can be checked before a model is sharded is right.

    Raises:
        UsageError: An option that transformers does not have, or a field that `DistributedConfig` does not have.
    """
    require_usual(options)
    known = [field.name for field in fields(DistributedConfig)]
    for name in options.config:
        if name not in known:
            raise UsageError("config", name, known)
    if options.config.get("pp_size") not in (None, 1):
        raise UsageError("config.pp_size", options.config["pp_size"], "1: pipelines are not verified")
    return options


def distributed_config(options: TrainingOptions, topology: Topology) -> DistributedConfig:
    """Return the configuration for `from_pretrained`: TP innermost, FSDP2 over the DP ranks.

    Raises:
        UsageError: The user's configuration contradicts the topology.
    """
    own: dict[str, Any] = {"tp_size": topology.tp, "fsdp_size": topology.dp // _replicas(options, topology)}
    for name, size in own.items():
        if options.config.get(name) not in (None, size):
            raise UsageError(f"config.{name}", options.config[name], f"{size}, as the topology says")
    return DistributedConfig(**{**own, **options.config})


def _replicas(options: TrainingOptions, topology: Topology) -> int:
    replicas = options.config.get("dp_replicate_size") or 1
    if topology.dp % replicas:
        raise UsageError("config.dp_replicate_size", replicas, f"a divisor of dp={topology.dp}")
    return int(replicas)
