"""Versions of packages, and how many cores this process may use."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WORLD_FOLDER_VARIABLE = "TPCHECK_WORLD"
"""Names the world's folder, which is removed with it; processes that a rank starts inherit it."""

_PACKAGES = ("tpcheck", "torch", "transformers")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that every run uses, where installed; imports none of them."""
    return {"python": platform.python_version(), **installed_versions(_PACKAGES)}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed; imports none of them."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def num_cores() -> int:
    """Return how many cores this process may use: its CPU affinity, or fewer where its container has a CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, cpu_quotas())]))


def cpu_quotas(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Yield the quota, in cores, of each control group (version 1 and 2) of this process that has one.

    The root group always counts: in a container it is the container's group, whatever /proc calls it.
    """
    for controllers, group in _control_groups(proc):
        root = cgroups / controllers
        folder = root / group.lstrip("/")
        for parent in {root, folder, *folder.parents}:
            if parent.is_relative_to(root):
                with suppress(OSError, ValueError):  # a file that is not there; "max", which is no number
                    quota, period = _quota_and_period(parent, is_version_2=not controllers)
                    if quota > 0:  # -1 is none
                        yield quota / period


def _control_groups(proc: Path) -> Iterator[tuple[str, str]]:
    """Yield each group that limits CPU time, after the folder of its controllers ("" in version 2)."""
    with suppress(OSError):
        for line in os.fsdecode((proc / "self" / "cgroup").read_bytes()).splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                yield controllers, group


def _quota_and_period(group: Path, *, is_version_2: bool) -> tuple[int, int]:
    if is_version_2:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota), int(period)
    return int((group / "cpu.cfs_quota_us").read_text()), int((group / "cpu.cfs_period_us").read_text())
