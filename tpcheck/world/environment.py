"""The environment variables that a rank, and the template it is forked from, live in."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tpcheck.core.topology import Topology

# Left over from a launcher around the controller, these would send a rank to a store that is not its own, or contradict
# its LOCAL_RANK: DeepSpeed then raises for Open MPI's. What torchrun says of nodes is read by Lightning.
_FOREIGN_PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "PMIX_", "MPI_LOCAL")
_FOREIGN_NAMES = {"GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"}


WORLD_MARK = "TPCHECK_WORLD"  # its value is the world's folder; what a rank starts inherits it


def rank_environ(
    base: Mapping[str, str],
    *,
    topology: Topology,
    rank: int,
    port: int,
    device: str,
    scratch: str,
    extra: Mapping[str, str],
) -> dict[str, str]:
    """Return the environment of one rank: the caller's, what launchers set, and what keeps ranks quick and honest."""
    world_size = str(topology.world_size)
    kept = {
        name: value
        for name, value in base.items()
        if not name.startswith(_FOREIGN_PREFIXES) and name not in _FOREIGN_NAMES
    }
    return {
        **_defaults(scratch),
        **kept,
        **template_environ(device),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "LOCAL_SIZE": world_size,  # DeepSpeed's name for it; unset, its CPU communication crashes
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **extra,
        WORLD_MARK: scratch,
    }


def template_environ(device: str) -> dict[str, str]:
    """Return what must hold while torch, transformers and deepspeed are imported."""
    return {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": device,
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # counts GPUs without initialising CUDA, which would not survive a fork
    }


def visible_gpus(environ: Mapping[str, str]) -> int:
    """Return how many NVIDIA GPUs this process may use, going by device files: the controller has no torch to ask."""
    installed = len([path for path in Path("/dev").glob("nvidia*") if path.name[len("nvidia") :].isdigit()])
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not installed:
        return installed
    return len([name for name in chosen.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])


def apply(environ: Mapping[str, str]) -> None:
    """Make `os.environ` exactly this."""
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update(environ)


def _defaults(scratch: str) -> dict[str, str]:
    """Return what the user's own environment may override."""
    return {
        # Without it an all-reduce of float32 with int32 passes silently and a shape mismatch aborts the process.
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        # A killed build leaves a lock on which every later build in the same place waits for ever: keep ours apart.
        "TORCH_EXTENSIONS_DIR": str((_writable_cache() or Path(scratch)) / "tpcheck" / "torch_extensions"),
        "TOKENIZERS_PARALLELISM": "false",
        # torch's TCPStore looks up its peer's name; unanswered, that takes 5 s.
        "RES_OPTIONS": "timeout:1 attempts:1",
    }


def _writable_cache() -> Path | None:
    """Return the folder of this user's caches; None where there is none that can be written to."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
        existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    except (OSError, RuntimeError):  # not to be looked into; no HOME and no line in /etc/passwd
        return None
    return cache if os.access(existing, os.W_OK | os.X_OK) else None
