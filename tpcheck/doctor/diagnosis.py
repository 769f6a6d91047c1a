"""The diagnosis of this machine (devices, versions, leftovers of killed runs) and of a DeepSpeed configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from packaging.version import Version

from tpcheck.core.environment import installed_versions, num_cores
from tpcheck.doctor.deepspeed import Advice, Saved, Severity, config_advice, what_is_saved
from tpcheck.report import words
from tpcheck.report.table import Cell, Column, Row, Table, table_lines
from tpcheck.report.words import Line, labelled, plain

_STYLES: Mapping[Severity, str] = {"broken": "bold red", "trap": "bold yellow", "advice": "bold"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Versions, devices and problems.

    Attributes:
        versions: By package name; None for a package that is not installed.
        devices: Processors and accelerators, as text.
        advice: The problems.
        saved: The files of each way of saving; empty without a configuration.
    """

    versions: Mapping[str, str | None]
    devices: tuple[str, ...]
    advice: tuple[Advice, ...]
    saved: tuple[Saved, ...] = ()

    @property
    def is_broken(self) -> bool:
        return bool(self.counts()["broken"])

    def counts(self) -> dict[Severity, int]:
        """Return how many problems there are of each severity, the most severe first."""
        return {severity: sum(advice.severity == severity for advice in self.advice) for severity in _STYLES}


def diagnose(config: Mapping[str, Any] | None = None) -> Diagnosis:
    """Return the problems of this machine and of a DeepSpeed configuration."""
    versions = {**dict.fromkeys(PACKAGES), **installed_versions(PACKAGES)}
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - without a home it stays `~`, as in torch; Path.home raises
    advice = (
        *bad_versions(versions),
        *stale_locks(extension_caches(os.environ, home)),
        *leaked_shared_memory(),
        *(config_advice(config) if config is not None else ()),
    )
    saved = tuple(what_is_saved(config)) if config is not None else ()
    return Diagnosis(versions, devices(), advice, saved)


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[Line]:
    """Yield versions and devices, then the problems."""
    versions = (f"{package} {version or 'is not installed'}" for package, version in diagnosis.versions.items())
    yield from labelled("versions", ", ".join(versions))
    yield from labelled("devices", ", ".join(diagnosis.devices))
    if diagnosis.saved:
        yield Line()
        yield plain("files that this configuration saves", "bold")
        rows = (
            Row((Cell(saved.way), Cell(saved.writes, "" if saved.is_model else "yellow"))) for saved in diagnosis.saved
        )
        yield from table_lines(Table((Column("call"), Column("writes")), tuple(rows), indent=2))
    for advice in diagnosis.advice:
        yield Line()
        yield plain(f"{advice.severity}: {advice.rule}", _STYLES[advice.severity])
        yield from labelled("what", advice.what)
        if advice.fix:
            yield from labelled("fix", advice.fix, "cyan")
        if advice.link:
            yield from labelled("see", advice.link, "dim")
    yield Line()
    if diagnosis.advice:
        counts = ", ".join(f"{number} {severity}" for severity, number in diagnosis.counts().items() if number)
        total = words.pluralize(len(diagnosis.advice), "finding")
        yield plain(f"{total}: {counts}", "bold red" if diagnosis.is_broken else "bold yellow")
    else:
        yield plain("no problems", "bold green")


def diagnosis_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis as JSON holds it."""
    return {
        "schema": 1,
        "verdict": "failed" if diagnosis.is_broken else "passed",
        "versions": dict(diagnosis.versions),
        "devices": list(diagnosis.devices),
        "findings": [asdict(advice) for advice in diagnosis.advice],
        "saved": [asdict(saved) for saved in diagnosis.saved],
    }


def devices() -> tuple[str, ...]:
    """Return the processors and accelerators as text. Imports torch."""
    cores = f"{num_cores()} CPU cores"
    try:
        import torch
    except ImportError:
        return (cores,)
    return (cores, *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))


_SHM_GLOB = "deepspeed_allreduce_buffer_*"


def extension_caches(environment: Mapping[str, str], home: Path) -> tuple[Path, ...]:
    """Return the folders in which torch builds extensions: TORCH_EXTENSIONS_DIR and the default."""
    chosen = environment.get("TORCH_EXTENSIONS_DIR")
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    return (*([Path(chosen)] if chosen else []), cache / "torch_extensions")


def stale_locks(caches: Iterable[Path]) -> Iterator[Advice]:
    """Yield the locks of builds that no process holds open: torch silently waits for them for ever."""
    locks = sorted({lock for cache in caches for lock in _locks(cache)})
    open_files = _open_files() if locks else set()
    for lock in locks:
        if str(lock.resolve()) not in open_files:
            yield Advice(
                rule="stale_lock",
                what=f"{lock} is left over from a killed build: the next build of {lock.parent.name} will hang",
                fix=f"rm {lock}",
                link="https://github.com/pytorch/pytorch/blob/main/torch/utils/file_baton.py",
            )


def leaked_shared_memory(folder: Path = Path("/dev/shm"), proc: Path = Path("/proc")) -> Iterator[Advice]:
    """Yield the shared-memory segments of DeepSpeed's all-reduce that no process maps."""
    segments = sorted(folder.glob(_SHM_GLOB))
    mapped = _mapped_files(proc) if segments else frozenset()
    leaked = [segment for segment in segments if str(segment) not in mapped]
    if leaked:
        size = sum(_size(segment) for segment in leaked) / 2**20
        paths = " ".join(str(segment) for segment in leaked)
        yield Advice(
            rule="leaked_shared_memory",
            what=f"{len(leaked)} segments in {folder} ({size:.0f} MiB) belong to no process: DeepSpeed's all-reduce "
            "for CPUs leaks one for each rank of each world",
            fix=f"rm {paths}" if len(leaked) <= 4 else f"rm {folder}/{_SHM_GLOB}",
            severity="advice",
        )


def _locks(cache: Path) -> list[Path]:
    """Return the locks in a cache; none if it is not readable, such as /root for another user of a container."""
    with suppress(OSError):
        return [lock for lock in cache.glob("**/lock") if lock.is_file()]
    return []


def _size(segment: Path) -> int:
    with suppress(FileNotFoundError):  # its world has just removed it
        return segment.stat().st_blocks * 512
    return 0


def _open_files() -> set[str]:
    """Return every file that a process of this user has open."""
    paths = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's process, or one that has just ended
            paths |= {file.path for file in process.open_files()}
    return paths


def _mapped_files(proc: Path) -> frozenset[str]:
    """Return every file that a process of this user has mapped."""
    paths = set()
    for maps in proc.glob("[0-9]*/maps"):
        with suppress(OSError):
            paths |= {line.split(maxsplit=5)[-1] for line in os.fsdecode(maps.read_bytes()).splitlines() if "/" in line}
    return frozenset(paths)


PACKAGES = ("tpcheck", "torch", "deepspeed", "transformers", "accelerate")


# Vulnerabilities: name, package, the first version without it, what it is.
_KNOWN_CVES = (
    ("CVE-2025-32434", "torch", (2, 6), "weights_only=True of torch.load can be bypassed"),
    ("CVE-2026-24747", "torch", (2, 10), "weights_only=True of torch.load can be bypassed"),
)


def bad_versions(versions: Mapping[str, str | None]) -> Iterator[Advice]:
    """Yield the installed versions with a known fault."""
    for name, package, fixed_in, what in _KNOWN_CVES:
        installed = versions.get(package)
        if installed and Version(installed).release < fixed_in:
            yield Advice(
                rule="bad_version",
                what=f"{package} {installed}: {what} ({name})",
                fix=f"pip install '{package}>={'.'.join(map(str, fixed_in))}'",
                link=f"https://nvd.nist.gov/vuln/detail/{name}",
                severity="trap",
            )
