"""What killed runs left on this machine: locks that stop the next build for ever, and shared memory nobody owns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tpcheck.doctor.advice import Advice

_SHARED_MEMORY = "deepspeed_allreduce_buffer_*"


def extension_caches(environment: Mapping[str, str], home: Path) -> tuple[Path, ...]:
    """Return where torch builds extensions: its default, and TORCH_EXTENSIONS_DIR."""
    chosen = environment.get("TORCH_EXTENSIONS_DIR")
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    return (*([Path(chosen)] if chosen else []), cache / "torch_extensions")


def stale_locks(caches: Iterable[Path], proc: Path = Path("/proc")) -> Iterator[Advice]:
    """Locks of builds that no process holds: torch waits for them to vanish, silently and for ever."""
    locks = sorted({lock for cache in caches for lock in _locks(cache)})
    held = _open_files(proc) if locks else frozenset()
    for lock in locks:
        if str(lock.resolve()) not in held:
            yield Advice(
                rule="stale_lock",
                what=f"{lock} was left by a build that was killed: the next build of {lock.parent.name} waits for ever",
                fix=f"rm {lock}",
                link="https://github.com/pytorch/pytorch/blob/main/torch/utils/file_baton.py",
            )


def leaked_shared_memory(folder: Path = Path("/dev/shm"), proc: Path = Path("/proc")) -> Iterator[Advice]:
    """Segments of DeepSpeed's shared-memory all-reduce that no process maps."""
    segments = sorted(folder.glob(_SHARED_MEMORY))
    mapped = _mapped_files(proc) if segments else frozenset()
    leaked = [segment for segment in segments if str(segment) not in mapped]
    if leaked:
        size = sum(_size(segment) for segment in leaked) / 2**20
        few = " ".join(str(segment) for segment in leaked)
        yield Advice(
            rule="leaked_shared_memory",
            what=f"{len(leaked)} segments in {folder} ({size:.0f} MiB) belong to no process: DeepSpeed's all-reduce "
            "for CPUs leaks one for each rank of each world",
            fix=f"rm {few}" if len(leaked) <= 4 else f"rm {folder}/{_SHARED_MEMORY}",
        )


def _locks(cache: Path) -> list[Path]:
    """Return the locks in a cache; none where it may not be looked into, as /root by another user of a container."""
    with suppress(OSError):
        return [lock for lock in cache.glob("**/lock") if lock.is_file()]
    return []


def _size(segment: Path) -> int:
    with suppress(FileNotFoundError):  # removed meanwhile by the world that it belonged to
        return segment.stat().st_blocks * 512
    return 0


def _open_files(proc: Path) -> frozenset[str]:
    """Return every file that a process of this user has open."""
    found = set()
    for folder in proc.glob("[0-9]*/fd"):
        with suppress(OSError):  # another user's process, or one that has just ended
            for descriptor in folder.iterdir():
                with suppress(OSError):
                    found.add(str(descriptor.readlink()))
    return frozenset(found)


def _mapped_files(proc: Path) -> frozenset[str]:
    """Return every file that a process of this user has mapped."""
    found = set()
    for maps in proc.glob("[0-9]*/maps"):
        with suppress(OSError):
            found |= {line.split(maxsplit=5)[-1] for line in os.fsdecode(maps.read_bytes()).splitlines() if "/" in line}
    return frozenset(found)
