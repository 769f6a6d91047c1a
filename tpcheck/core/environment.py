"""What a run is made of and runs on: packages and cores."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("tpcheck", "torch", "transformers")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that every run uses, where installed; imports none of them."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def num_cores() -> int:
    """Return how many cores this process may use: those it may run on, or fewer where its container has a CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, cpu_quotas())]))


def cpu_quotas(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Return the quota, in cores, of each control group that this process is in, of version 1 and 2.

    The root is always looked at: in a container it is the container's own group, whatever /proc calls it.
    """
    for controllers, group in _control_groups(proc):
        root = cgroups / controllers
        folder = root / group.lstrip("/")
        for each in {root, folder, *folder.parents}:
            if each.is_relative_to(root):
                with suppress(OSError, ValueError):  # a file that is not there; "max", which is no number
                    quota, period = _quota_and_period(each, is_version_2=not controllers)
                    if quota > 0:  # -1 is none
                        yield quota / period


def _control_groups(proc: Path) -> Iterator[tuple[str, str]]:
    """Return the controllers that limit CPU time, as their folder is named (nothing in version 2), and the group."""
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
