"""The cores that a run may use are those of its CPU affinity and of its container's quota."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpcheck.core import environment
from tpcheck.core.environment import cpu_quotas, num_cores


def system(tmp_path: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Return folders like /proc and /sys/fs/cgroup."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "proc", tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/", {"cpu.max": "max 100000\n"}, []),
        ("0::/", {}, []),
        ("0::/user/job/step\n", {"user/job/cpu.max": "400000 100000\n", "user/cpu.max": "max 100000\n"}, [4.0]),
        ("0::/not/seen/from/here", {"cpu.max": "200000 100000\n"}, [2.0]),
        (
            "2:cpu,cpuacct:/docker/1\n1:cpuset:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            [3.0],
        ),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
    ],
)
def test_the_cpu_quota_of_a_container_is_read(
    tmp_path: Path, groups: str, files: dict[str, str], quotas: list[float]
) -> None:
    assert list(cpu_quotas(*system(tmp_path, groups, files))) == quotas


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert list(cpu_quotas(tmp_path, tmp_path)) == []


@pytest.mark.parametrize(("quotas", "cores"), [([], 8), ([1.5, 3.0], 2), ([0.1], 1), ([64.0], 8)])
def test_cores_are_those_allowed_or_the_quota(monkeypatch: pytest.MonkeyPatch, quotas: list[float], cores: int) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(environment, "cpu_quotas", lambda: iter(quotas))
    assert num_cores() == cores
