"""The environment variables of a rank and of the forkserver that it is forked from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tpcheck.core.environment import WORLD_FOLDER_VARIABLE
from tpcheck.core.topology import Topology

# Inherited from a launcher around the controller, these would send a rank to another store, or contradict its
# LOCAL_RANK: DeepSpeed raises for Open MPI's, and Lightning reads torchrun's node variables.
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "PMIX_", "MPI_LOCAL")
_LAUNCHER_NAMES = {"GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"}


@dataclass(frozen=True, slots=True)
class LauncherPlace:
    """What a launcher around the ranks decides: a rank's place on its machine, and where rank 0 is."""

    local_rank: int
    num_local: int
    master_addr: str
    is_one_machine: bool


def rank_environ(
    base: Mapping[str, str],
    *,
    topology: Topology,
    rank: int,
    port: int,
    device: str,
    scratch: str,
    extra: Mapping[str, str],
    launched: LauncherPlace | None = None,
) -> dict[str, str]:
    """Return the environment of one rank: the caller's, the variables that launchers set, and tpcheck's defaults.

    Args:
        launched: The place of the rank where a launcher started the process that it is forked for, whose variables
            it then keeps; None for a rank of a world that lies on this machine whatever is around it.
    """
    place = launched or LauncherPlace(rank, topology.world_size, "127.0.0.1", is_one_machine=True)
    return {
        **_defaults(scratch, is_one_machine=place.is_one_machine),
        **_inherited(base, is_launched=launched is not None),
        **forkserver_environ(device),
        "RANK": str(rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_WORLD_SIZE": str(place.num_local),
        "LOCAL_SIZE": str(place.num_local),  # DeepSpeed's name; its CPU communication crashes where it is unset
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(port),
        **extra,
        WORLD_FOLDER_VARIABLE: scratch,
    }


def _inherited(base: Mapping[str, str], *, is_launched: bool) -> dict[str, str]:
    """Return the variables that a rank inherits. It meets the others in a store of its world, not in the agent's."""
    if is_launched:
        return {name: value for name, value in base.items() if not name.startswith("TORCHELASTIC_")}
    return {
        name: value
        for name, value in base.items()
        if not name.startswith(_LAUNCHER_PREFIXES) and name not in _LAUNCHER_NAMES
    }


def forkserver_environ(device: str) -> dict[str, str]:
    """Return the variables that must be set while torch, transformers and deepspeed are imported."""
    return {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": device,
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # counts GPUs without initialising CUDA, which would not survive a fork
    }


def visible_gpus(environ: Mapping[str, str]) -> int:
    """Return how many NVIDIA GPUs this process may use, by device files: the controller does not import torch."""
    installed = len([path for path in Path("/dev").glob("nvidia*") if path.name[len("nvidia") :].isdigit()])
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not installed:
        return installed
    return len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])


def _defaults(scratch: str, *, is_one_machine: bool) -> dict[str, str]:
    """Return the variables that the user's environment overrides."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    return {
        **(loopback if is_one_machine else {}),
        # Without it an all-reduce of float32 with int32 passes silently and a shape mismatch aborts the process.
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        # A killed build leaves a lock that blocks every later build in the same folder: use a folder of tpcheck alone.
        "TORCH_EXTENSIONS_DIR": str((_writable_cache() or Path(scratch)) / "tpcheck" / "torch_extensions"),
        "TOKENIZERS_PARALLELISM": "false",
        # torch's TCPStore looks up the name of its peer, which takes 5 s where no server answers.
        "RES_OPTIONS": "timeout:1 attempts:1",
    }


def _writable_cache() -> Path | None:
    """Return the user's cache folder, None where it is not writable."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
        existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    except (OSError, RuntimeError):  # not readable; no HOME and no line in /etc/passwd
        return None
    return cache if os.access(existing, os.W_OK | os.X_OK) else None
