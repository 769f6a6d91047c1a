"""What a forkserver is asked to fork: the plan of a world, and the process that each of its ranks is forked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tpcheck.core.topology import Topology
from tpcheck.world.environment import LauncherPlace, rank_environ
from tpcheck.world.groups import StoreAddress, device_of
from tpcheck.world.messages import ForkRank


@dataclass(frozen=True, slots=True)
class WorldPlan:
    """The settings that all ranks of a world share.

    Attributes:
        device: `cpu` or `cuda`.
        backend: `gloo` or `nccl`.
        preload: Modules imported before ranks are forked, None for the defaults.
        extra_preload: Modules imported after those, where they are installed.
        capture: Keep the output of ranks.
        env: Environment variables for the ranks, which override all others.
    """

    topology: Topology
    device: str
    backend: str
    preload: tuple[str, ...] | None
    extra_preload: tuple[str, ...]
    capture: bool
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RankOrigin:
    """The process that a rank is forked for: the rank gets its environment, folder, arguments and import path.

    Attributes:
        local_rank: Index among the ranks that choose from the same GPUs.
        num_gpus: GPUs that they choose from.
        launched: The rank's place where that process is itself a rank of a launcher.
    """

    rank: int
    local_rank: int
    num_gpus: int
    environ: Mapping[str, str]
    sys_path: tuple[str, ...]
    argv: tuple[str, ...]
    cwd: str
    launched: LauncherPlace | None = None

    @classmethod
    def here(cls, rank: int, *, local_rank: int, num_gpus: int, launched: LauncherPlace | None = None) -> RankOrigin:
        """Return the origin of a rank that is forked for this process."""
        return cls(
            rank=rank,
            local_rank=local_rank,
            num_gpus=num_gpus,
            environ=dict(os.environ),
            sys_path=tuple(sys.path),
            argv=tuple(sys.argv),
            cwd=str(Path.cwd()),
            launched=launched,
        )


def fork_request(
    plan: WorldPlan, origin: RankOrigin, *, scratch: str, port: int, store: StoreAddress | None = None
) -> ForkRank:
    """Return the request to fork one rank, whose world has this folder, MASTER_PORT and store."""
    environ = rank_environ(
        origin.environ,
        topology=plan.topology,
        rank=origin.rank,
        port=port,
        device=plan.device,
        scratch=scratch,
        extra=plan.env,
        launched=origin.launched,
    )
    return ForkRank(
        rank=origin.rank,
        topology=plan.topology,
        device=device_of(origin.local_rank, kind=plan.device, num_gpus=origin.num_gpus),
        backend=plan.backend,
        scratch=scratch,
        environ=environ,
        sys_path=origin.sys_path,
        argv=origin.argv,
        cwd=origin.cwd,
        store=store,
    )
