"""The forkserver: a process that imports everything once, forks ranks on request, and waits for them.

It never runs a tensor operation: children forked after a multi-threaded one never finish. It has one thread, and its
only state is the processes of the worlds that are open.
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
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tpcheck.core.environment import WORLD_FOLDER_VARIABLE
from tpcheck.world import deepspeed_shm_comm, messages, rank_main
from tpcheck.world.channel import Channel
from tpcheck.world.when_imported import when_imported

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PARENT_CHECK_S = 1.0  # the controller's socket closes when it exits, unless a forked copy of it keeps the socket open


def main(descriptor: int, preload_names: Sequence[str], scratch: str) -> None:
    """Serve the controller at the other end of `descriptor` until it exits; then remove the folder `scratch`."""
    try:
        _serve(descriptor, preload_names)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)  # the controller waits for the end, and an interpreter takes long to drop what it has imported


def _serve(descriptor: int, preload_names: Sequence[str]) -> None:
    with contextlib.suppress(OSError):  # already a group leader where the controller made it one
        os.setpgid(0, 0)  # Ctrl-C is for the controller, which ends the ranks in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    controller = Channel(socket.socket(fileno=descriptor))
    # A collection would write to, and so copy, the pages that all ranks share. Those during the imports, and one after
    # them, take a quarter of the time until here (0.8 of 3.4 s), and free no memory.
    gc.disable()
    import_errors = import_all(preload_names)
    deepspeed_shm_comm.disable()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gc.freeze()
    controller.send(messages.ForkserverReady(_num_gpus(), import_errors))
    _Forkserver(controller).serve()


def import_all(names: Sequence[str]) -> dict[str, str]:
    """Import the modules that are installed; return those that fail to import, each with its error.

    A rank that needs such a module imports it again and fails with the error in its own traceback.
    """
    import_errors: dict[str, str] = {}
    for name in names:
        package = name.partition(".")[0]
        if name in sys.modules or (package not in sys.modules and find_spec(package) is None):
            continue
        try:
            with models_listed_fast() if package == "transformers" else contextlib.nullcontext():
                import_module(name)
        except Exception as error:
            import_errors[name] = f"{type(error).__name__}: {error}"
    _spare_ranks()
    return import_errors


@contextlib.contextmanager
def models_listed_fast() -> Iterator[None]:
    """While it is imported, let transformers list what its 2,500 files of models export in 0.1 s instead of 0.25.

    It splits each file into lines, 36 MB of them, for an `__all__` near its end. It lists a folder, and may list the
    files beside its `__init__.py` later, and keeps either by that path: it reads all twice.
    """
    undo, is_over = contextlib.ExitStack(), False

    def change(import_utils: Any) -> None:
        list_names: Any = getattr(import_utils, "create_import_structure_from_path", None)
        names_in_all: Any = getattr(import_utils, "fetch__all__", None)
        if is_over or not hasattr(list_names, "cache_info") or names_in_all is None:  # private names
            return
        undo.callback(setattr, import_utils, "create_import_structure_from_path", list_names)
        undo.callback(setattr, import_utils, "fetch__all__", names_in_all)
        import_utils.create_import_structure_from_path = lambda path: list_names(
            Path(path).parent if Path(path).name == "__init__.py" else path
        )
        import_utils.fetch__all__ = lambda content: names_in_all(content[content.rfind("\n__all__") + 1 :])

    when_imported("transformers.utils.import_utils", change)
    try:
        with undo:
            yield
    finally:
        is_over = True


def _spare_ranks() -> None:
    """Do what ranks would do each, and copy pages for: 1,000 of the 3,000 that a rank of an empty world copies."""
    # Imports are to see folders that do not exist yet; existing ones are checked by mtime.
    for folder in [path for path, finder in sys.path_importer_cache.items() if finder is None]:
        del sys.path_importer_cache[folder]
    # Where Dynamo is loaded, `init_process_group` clears these, and frees what they hold.
    if (trace_rules := sys.modules.get("torch._dynamo.trace_rules")) is not None:
        getattr(trace_rules, "clear_lru_cache", lambda: None)()


class _World:
    def __init__(self, channel: Channel, request: messages.OpenWorld) -> None:
        self.channel = channel
        self.request = request
        self.rank_by_pid: dict[int, int] = {}  # of ranks that run
        self.process_groups: set[int] = set()

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # the controller has exited, or has closed this world
            self.channel.send(message)


class _Forkserver:
    def __init__(self, controller: Channel) -> None:
        self._controller = controller
        self._parent = os.getppid()
        self._worlds: list[_World] = []
        self._opened_before = False
        self._num_modules_collapsed = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(controller, selectors.EVENT_READ, None)
        self._wakeup = socket.socketpair()
        for end in self._wakeup:
            end.setblocking(False)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ, None)
        signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler no byte is written to the wakeup socket

    def serve(self) -> None:
        while not self._controller.ended and os.getppid() == self._parent:
            events = self._selector.select(_PARENT_CHECK_S)
            with contextlib.suppress(BlockingIOError):
                self._wakeup[0].recv(4096)
            self._reap()
            for request, (descriptor,) in self._controller.receive_available():
                self._open(request, descriptor)
            for key, _ in events:
                if isinstance(key.data, _World) and key.data in self._worlds:
                    self._serve_world(key.data)
        for world in list(self._worlds):
            self._end(world)

    def _open(self, request: messages.OpenWorld, descriptor: int) -> None:
        import_all(request.extra_preload)
        gc.freeze()  # a rank's collections pass over it: each takes 0.07 s where TorchInductor is not frozen
        # It takes as long as ten worlds save by it: not for the first one. Pages stay collapsed until more modules are
        # imported; to look at all of them takes 9 of the 17 ms of processor time that 2 ranks cost this process.
        if self._opened_before and len(sys.modules) != self._num_modules_collapsed:
            _collapse_into_huge_pages()
            self._num_modules_collapsed = len(sys.modules)
        self._opened_before = True
        world = _World(Channel(socket.socket(fileno=descriptor)), request)
        self._worlds.append(world)
        self._selector.register(world.channel, selectors.EVENT_READ, world)

    def _serve_world(self, world: _World) -> None:
        for message, descriptors in world.channel.receive_available():
            if isinstance(message, messages.ForkRank):
                self._fork(world, message, descriptors)
            elif isinstance(message, messages.SignalRanks):
                for pid, rank in world.rank_by_pid.items():
                    if rank in message.ranks:
                        os.kill(pid, message.number)
            else:
                self._end(world)
                return
        if world.channel.ended:
            self._end(world)

    def _fork(self, world: _World, request: messages.ForkRank, descriptors: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            _become_rank(request, descriptors, self._close_everything)
        with contextlib.suppress(OSError):  # parent and child both do this: the first one counts
            os.setpgid(pid, pid)
        world.rank_by_pid[pid] = request.rank
        world.process_groups.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        world.send(messages.RankForked(request.rank, pid))
        self._reap()  # a rank may die while the others of a large world are still to be forked

    def _reap(self) -> None:
        """Collect every exit status: of ranks, and of orphaned processes that ranks started."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for world in self._worlds:
                if pid in world.rank_by_pid:
                    world.send(messages.RankExited(world.rank_by_pid.pop(pid), status))

    def _end(self, world: _World) -> None:
        left_behind = [pid for rank_pid in world.rank_by_pid for pid in children_among_all(rank_pid, recursive=True)]
        for pid in world.rank_by_pid:
            os.kill(pid, signal.SIGKILL)
        left_behind += self._orphans(world)
        end_processes(world.process_groups, extra_pids=left_behind, reap=self._reap)
        remove_files(world.request.scratch, world.request.port)
        world.send(messages.WorldEnded())
        self._worlds.remove(world)
        self._selector.unregister(world.channel)
        world.channel.close()

    def _orphans(self, world: _World) -> list[int]:
        """Return the processes that exited ranks of this world started, which are children of the forkserver now."""
        rank_pids = {pid for open_world in self._worlds for pid in open_world.rank_by_pid}
        orphans = [pid for pid in children(os.getpid()) if pid not in rank_pids]
        is_only_world = self._worlds == [world]
        folders = {world.request.scratch, None} if is_only_world else {world.request.scratch}
        return [
            pid
            for orphan in orphans
            for pid in (orphan, *children_among_all(orphan, recursive=True))
            if world_folder_of(pid) in folders
        ]

    def _close_everything(self) -> None:
        """Close, in a rank, the descriptors of the forkserver: otherwise nobody sees when the forkserver exits."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        sockets: tuple[socket.socket | Channel, ...] = (*self._wakeup, self._controller)
        for sock in (*sockets, *(world.channel for world in self._worlds)):
            sock.close()


def _become_rank(request: messages.ForkRank, descriptors: list[int], close_everything: Callable[[], None]) -> None:
    try:
        os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        close_everything()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.enable()
        rank_main.rank_main(request, descriptors)
    except BaseException:
        traceback.print_exc()  # to the stderr of the rank, once that is in place
    finally:
        os._exit(70)  # EX_SOFTWARE: rank_main never returns


def _num_gpus() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.device_count() if torch is not None and torch.version.cuda is not None else 0


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _LIBC.prctl(option, value, 0, 0, 0)


# Huge pages make the fork of a rank cheaper: less of the page table is copied, and fewer pages fault. From start to
# exit of a world with one all_reduce; 30 worlds with and 30 without, alternating, on a busy machine with 2 cores:
#   2 ranks: fastest 56 ms against 85 ms, median 542 ms against 862 ms
#   4 ranks: fastest 160 ms against 320 ms, median 851 ms against 1131 ms
_MADV_COLLAPSE = 25  # include/uapi/asm-generic/mman-common.h
_HUGE_PAGE = 2 << 20  # of x86-64, and of arm64 with 4 KiB pages; the kernel declines regions that do not fit


def _collapse_into_huge_pages() -> None:
    """Ask the kernel to collapse every large anonymous region."""
    for start, end in _anonymous_regions():
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        if (size := end // _HUGE_PAGE * _HUGE_PAGE - first) > 0:
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_COLLAPSE)


def _anonymous_regions() -> Iterator[tuple[int, int]]:
    maps = Path("/proc/self/maps")
    for line in maps.read_bytes().splitlines() if maps.exists() else ():  # paths may not be valid text
        addresses, permissions, _, _, inode, *_ = line.split()
        if permissions == b"rw-p" and inode == b"0":
            start, end = (int(address, 16) for address in addresses.split(b"-"))
            yield start, end


_EXIT_LIMIT_S = 2.0  # for helpers that clean up by themselves once every process that talks to them has exited
_SHARED_MEMORY = Path("/dev/shm")
# They unlink what dead processes left behind when their pipe closes; killed, they would leave it.
_SELF_CLEANING = ("multiprocessing.resource_tracker", "torch_shm_manager")


def remove_files(scratch: str, port: int) -> None:
    """Remove a world's files, and the shared memory that DeepSpeed names after the world's port."""
    shutil.rmtree(scratch, ignore_errors=True)
    if _SHARED_MEMORY.is_dir():
        for segment in _SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            segment.unlink(missing_ok=True)


def end_processes(groups: set[int], *, extra_pids: Iterable[int], reap: Callable[[], None]) -> None:
    """Kill every process of these process groups, and those of `extra_pids` that still run; wait until they are gone.

    `reap` collects exit statuses: without it a dead process still exists.
    """
    pids = {pid for pid in psutil.pids() if _process_group_of(pid) in groups} | set(extra_pids)
    helpers = {pid for pid in pids if _cleans_up_by_itself(pid)}
    for pid in pids - helpers:
        _kill(pid)
    _wait_for(pids, reap)
    for pid in helpers & pids:
        _kill(pid)
    _wait_for(pids, reap)


def children(pid: int) -> list[int]:
    """Return the children of a process, in any process group.

    One that is reaped during the read may hide another, so this is for the process itself, which reaps none meanwhile.
    """
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (OSError, ValueError):  # a task has ended, or the system has no such files: psutil looks at every process
        return children_among_all(pid, recursive=False)


def children_among_all(pid: int, *, recursive: bool) -> list[int]:
    """Return the children of a process, all descendants if `recursive`, in any group: a look at every process."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=recursive)]
    except psutil.Error:
        return []


def world_folder_of(pid: int) -> str | None:
    """Return the folder of the world whose rank started this process, None where its environment names none."""
    try:
        folder: str | None = psutil.Process(pid).environ().get(WORLD_FOLDER_VARIABLE)
    except psutil.Error:
        return None
    return folder


def _process_group_of(pid: int) -> int | None:
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
    """Wait until these processes are gone, and remove those that are from `pids`; give up after a while."""
    deadline = time.monotonic() + _EXIT_LIMIT_S
    while pids and time.monotonic() < deadline:
        reap()
        pids -= {pid for pid in pids if _process_group_of(pid) is None}
        if pids:
            time.sleep(0.001)
