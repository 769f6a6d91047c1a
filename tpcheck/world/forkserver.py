"""The template process: imports everything once, then forks ranks on request and answers for them.

It never runs a tensor operation: children forked after a multi-threaded one never finish. It has one thread, and keeps
no state of any world beyond the processes it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tpcheck.world import messages, preload, rank_main, shm_allreduce
from tpcheck.world.channel import Channel
from tpcheck.world.environment import WORLD_MARK

_MADV_COLLAPSE = 25  # include/uapi/asm-generic/mman-common.h
_HUGE_PAGE = 2 << 20  # of x86-64, and of arm64 with 4 KiB pages; what does not fit is declined


def gather() -> None:
    """Ask the kernel to collapse every large anonymous region."""
    madvise = ctypes.CDLL(None).madvise
    for start, end in _anonymous_regions():
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        if (size := end // _HUGE_PAGE * _HUGE_PAGE - first) > 0:
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_COLLAPSE)


def _anonymous_regions() -> Iterator[tuple[int, int]]:
    maps = Path("/proc/self/maps")
    for line in maps.read_bytes().splitlines() if maps.exists() else ():  # paths may be no text
        addresses, permissions, _, _, inode, *_ = line.split()
        if permissions == b"rw-p" and inode == b"0":
            start, end = (int(address, 16) for address in addresses.split(b"-"))
            yield start, end


_PATIENCE_S = 2.0  # for helpers that clean up by themselves once everybody who talked to them is gone
_SHARED_MEMORY = Path("/dev/shm")
# They unlink what the dead left behind when their pipe ends; killed, they would leave it.
_SELF_CLEANING = ("multiprocessing.resource_tracker", "torch_shm_manager")


def remove_traces(scratch: str, port: int) -> None:
    """Remove a world's files, and the shared memory that DeepSpeed names after the world's port."""
    shutil.rmtree(scratch, ignore_errors=True)
    if _SHARED_MEMORY.is_dir():
        for segment in _SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            segment.unlink(missing_ok=True)


def end_processes(groups: set[int], *, also: Iterable[int], reap: Callable[[], None]) -> None:
    """End what ranks started and left: every member of their process groups, and `also` where they still run.

    `reap` collects exit statuses, without which a dead process would still be seen.
    """
    suspects = {pid for pid in _running() if _group_of(pid) in groups} | set(also)
    helpers = {pid for pid in suspects if _cleans_up_by_itself(pid)}
    for pid in suspects - helpers:
        _kill(pid)
    _wait_for(suspects, reap)
    for pid in helpers & suspects:
        _kill(pid)
    _wait_for(suspects, reap)


def children(pid: int) -> list[int]:
    """Return the children of a process, wherever they put themselves."""
    return _children(pid, recursive=False)


def descendants(pid: int) -> list[int]:
    """Return the children of a process and theirs, wherever they put themselves."""
    return _children(pid, recursive=True)


def world_of(pid: int) -> str | None:
    """Return the folder of the world whose rank started this process; None if it does not bear the mark."""
    try:
        folder: str | None = psutil.Process(pid).environ().get(WORLD_MARK)
    except psutil.Error:
        return None
    return folder


def _children(pid: int, *, recursive: bool) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=recursive)]
    except psutil.Error:
        return []


def _running() -> list[int]:
    pids: list[int] = psutil.pids()
    return pids


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _cleans_up_by_itself(pid: int) -> bool:
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
    return any(name in command for name in _SELF_CLEANING)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _wait_for(pids: set[int], reap: Callable[[], None]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while pids and time.monotonic() < deadline:
        reap()
        pids -= {pid for pid in pids if _group_of(pid) is None}
        if pids:
            time.sleep(0.001)


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Linux takes 107 bytes as the path of a socket, macOS 103; multiprocessing's is 40 longer than the folder chosen here:
# /tpcheck-abcdefgh/1234/listener-abcdefgh.
_LONGEST_FOLDER = 63
_ORPHANED_CHECK_S = 1.0  # the end of the controller's socket is the usual sign; a forked copy of it may hide that


def main(descriptor: int, names: Sequence[str]) -> None:
    """Serve the controller at the other end of `descriptor` until it goes."""
    with contextlib.suppress(OSError):  # already a leader where the controller could arrange it
        os.setpgid(0, 0)  # Ctrl-C is for the controller, which ends the ranks in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    controller = Channel(socket.socket(fileno=descriptor))
    broken = preload.import_all(names)
    shm_allreduce.disable()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection here would touch, and so copy, the pages that all ranks share
    gather()
    scratch = tempfile.mkdtemp(prefix="tpcheck-", dir=_folder_for_sockets(tempfile.gettempdir()))
    try:
        controller.send(messages.Ready(_num_gpus(), broken, scratch))
        _Template(controller).serve()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _folder_for_sockets(chosen: str) -> str:
    """Return the folder for temporary files, or /tmp where torch or a socket could not take a path in it."""
    try:
        fits = len(chosen.encode()) <= _LONGEST_FOLDER
    except UnicodeEncodeError:  # not text in the locale's encoding: torch's FileStore takes UTF-8 alone
        fits = False
    return "/tmp" if not fits and os.access("/tmp", os.W_OK | os.X_OK) else chosen


class _World:
    def __init__(self, channel: Channel, opened: messages.Open) -> None:
        self.channel = channel
        self.opened = opened
        self.running: dict[int, int] = {}  # pid to rank
        self.groups: set[int] = set()


class _Template:
    def __init__(self, controller: Channel) -> None:
        self._controller = controller
        self._parent = os.getppid()
        self._worlds: list[_World] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(controller, selectors.EVENT_READ, None)
        self._wakeup = socket.socketpair()
        for end in self._wakeup:
            end.setblocking(False)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ, None)
        signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler no byte is written

    def serve(self) -> None:
        while not self._controller.ended and os.getppid() == self._parent:
            events = self._selector.select(_ORPHANED_CHECK_S)
            with contextlib.suppress(BlockingIOError):
                self._wakeup[0].recv(4096)
            self._reap()
            for opened, (descriptor,) in self._controller.pump():
                self._open(opened, descriptor)
            for key, _ in events:
                if isinstance(key.data, _World) and key.data in self._worlds:
                    self._serve_world(key.data)
        for world in list(self._worlds):
            self._end(world)

    def _open(self, opened: messages.Open, descriptor: int) -> None:
        preload.import_all(opened.also)
        world = _World(Channel(socket.socket(fileno=descriptor)), opened)
        self._worlds.append(world)
        self._selector.register(world.channel, selectors.EVENT_READ, world)

    def _serve_world(self, world: _World) -> None:
        for message, descriptors in world.channel.pump():
            if isinstance(message, messages.Fork):
                self._fork(world, message, descriptors)
            elif isinstance(message, messages.Signal):
                for pid, rank in world.running.items():
                    if rank in message.ranks:
                        os.kill(pid, message.number)
            else:
                self._end(world)
                return
        if world.channel.ended:
            self._end(world)

    def _fork(self, world: _World, order: messages.Fork, descriptors: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            _become_rank(order, descriptors, self._close_everything)
        with contextlib.suppress(OSError):  # both sides do it: whichever is first
            os.setpgid(pid, pid)
        world.running[pid] = order.rank
        world.groups.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        _tell(world, messages.Forked(order.rank, pid))

    def _reap(self) -> None:
        """Collect every exit status: of ranks, and of the orphans they left to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for world in self._worlds:
                if pid in world.running:
                    _tell(world, messages.Exited(world.running.pop(pid), status))

    def _end(self, world: _World) -> None:
        strays = [stray for pid in world.running for stray in descendants(pid)]
        for pid in world.running:
            os.kill(pid, signal.SIGKILL)
        strays += self._orphans(world)
        end_processes(world.groups, also=strays, reap=self._reap)
        remove_traces(world.opened.scratch, world.opened.port)
        _tell(world, messages.Ended())
        self._worlds.remove(world)
        self._selector.unregister(world.channel)
        world.channel.close()

    def _orphans(self, world: _World) -> list[int]:
        """Return what ranks that are gone left to us, wherever it put itself, except what another world started."""
        ranks = {pid for other in self._worlds for pid in other.running}
        left = [orphan for orphan in children(os.getpid()) if orphan not in ranks]
        alone = self._worlds == [world]
        return [
            pid
            for orphan in left
            for pid in (orphan, *descendants(orphan))
            if world_of(pid) in ({world.opened.scratch, None} if alone else {world.opened.scratch})
        ]

    def _close_everything(self) -> None:
        """Let go, in a rank, of what belongs to the template: else nobody would see the template's end."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        ends: tuple[socket.socket | Channel, ...] = (*self._wakeup, self._controller)
        for sock in (*ends, *(world.channel for world in self._worlds)):
            sock.close()


def _become_rank(order: messages.Fork, descriptors: list[int], close_everything: Callable[[], None]) -> None:
    try:
        os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        close_everything()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.enable()
        rank_main.rank_main(order, descriptors)
    except BaseException:
        traceback.print_exc()  # on the rank's own stderr, once that is in place
    finally:
        os._exit(70)  # EX_SOFTWARE: rank_main never returns


def _tell(world: _World, message: object) -> None:
    with contextlib.suppress(OSError):  # the controller is gone, or has turned away from this world
        world.channel.send(message)


def _num_gpus() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.device_count() if torch is not None and torch.version.cuda is not None else 0


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _LIBC.prctl(option, value, 0, 0, 0)
