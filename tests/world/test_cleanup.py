"""A world leaves no process, descriptor, shared memory or file behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.world import rank_bodies as bodies
from tpcheck import RankFailure, Topology, spawn
from tpcheck.world.forkserver_client import get_forkserver

_SHM = Path("/dev/shm")


@pytest.fixture
def world_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    get_forkserver(
        "cpu"
    ).wait_until_ready()  # worlds keep the folder that it started with: paths of sockets must be short
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the ranks'
    return tmp_path


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder for the temporary files of a forkserver: paths of sockets must be short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def leftovers(tmp: Path) -> dict[str, object]:
    """Return everything that a world could leave behind."""
    scratch = get_forkserver("cpu").scratch
    return {
        "processes": len(psutil.Process().children(recursive=True)),
        "descriptors": psutil.Process().num_fds(),
        "shared memory": segments_without_a_process(),
        "files": sorted(path.name for folder in (tmp, Path(scratch)) for path in folder.iterdir()),
    }


def segments_without_a_process() -> set[str]:
    """Return the shared memory that no process has mapped: other programs on this machine have segments, too."""
    existing = {path.name for path in _SHM.iterdir()} if _SHM.is_dir() else set()
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if existing else ():
        with suppress(OSError):  # it has exited, or belongs to another user
            lines = os.fsdecode(maps.read_bytes()).splitlines()
            mapped |= {Path(line.split(maxsplit=5)[-1]).name for line in lines if str(_SHM) in line}
    return {name for name in existing - mapped if not name.startswith("pym-") and (_SHM / name).exists()}


def test_a_mapped_segment_is_not_a_leftover() -> None:
    from multiprocessing.shared_memory import SharedMemory

    if not _SHM.is_dir():
        pytest.skip("no /dev/shm here")
    segment = SharedMemory(create=True, size=4096)
    assert segment.name not in segments_without_a_process()
    segment.close()
    assert segment.name in segments_without_a_process()
    segment.unlink()


def survivors(pids: list[int], *, within_s: float = 5) -> list[str]:
    """Return a description of each of these processes that still runs after that time."""
    deadline = time.monotonic() + within_s
    while (running := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [_description(pid) for pid in running]


def test_20_worlds_leave_nothing(world_tmp: Path) -> None:
    with spawn(Topology(tp=2)) as world:
        world.run(bodies.all_reduce)  # starts the forkserver, which keeps running
    before = leftovers(world_tmp)
    for number in range(20):
        with spawn(Topology(tp=2)) as world:
            if number % 5 == 4:
                with pytest.raises(RankFailure):
                    world.run(bodies.fail_on_rank_1, ("raise_value_error", "exit_with")[number % 10 == 4], number)
            else:
                assert world.run(bodies.all_reduce) == (3, 3)
    assert leftovers(world_tmp) == before


@pytest.fixture(params=["alone", "beside_another_world"])
def other_world(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run another world, whose children must survive."""
    if request.param == "alone":
        yield
        return
    with spawn(Topology(tp=1)) as world:
        ((_, plain, new_session, _),) = world.run(bodies.leave_children_behind)
        yield
        assert all(_runs(pid) for pid in (plain, new_session))


@pytest.mark.usefixtures("other_world")
def test_child_processes_of_ranks_end_with_the_world(world_tmp: Path) -> None:
    with spawn(Topology(tp=2)) as world:
        world.run(bodies.process_id)
    before = leftovers(world_tmp)
    with spawn(Topology(tp=2)) as world:
        pids = [pid for rank in world.run(bodies.leave_children_behind) for pid in rank]
        assert all(_runs(pid) for pid in pids)
    assert survivors(pids, within_s=2) == []
    assert leftovers(world_tmp) == before


@pytest.mark.usefixtures("other_world")
def test_child_processes_of_a_killed_rank_end_with_the_world(world_tmp: Path) -> None:
    with spawn(Topology(tp=2)) as world:
        world.run(bodies.process_id)
    before = leftovers(world_tmp)
    pids_file = world_tmp / "pids"
    with spawn(Topology(tp=2)) as world, pytest.raises(RankFailure):
        world.run(bodies.leave_children_and_die, str(pids_file))
    written = list(world_tmp.glob("pids.*"))
    pids = [int(pid) for path in written for pid in path.read_text().split()]
    for path in written:
        path.unlink()
    assert len(pids) >= 4
    assert survivors(pids, within_s=2) == []
    assert leftovers(world_tmp) == before


def test_data_loader_workers_end_with_the_world(world_tmp: Path) -> None:
    with spawn(Topology(tp=2)) as world:
        world.run(bodies.process_id)
    before = leftovers(world_tmp)
    with spawn(Topology(tp=2)) as world:
        world.run(bodies.load_data_with_workers)
    assert leftovers(world_tmp) == before


def test_segments_that_deepspeed_leaks_are_removed() -> None:
    if not _SHM.is_dir():
        pytest.skip("no /dev/shm here")
    with spawn(Topology(tp=1)) as world:
        (port,) = world.run(bodies.environment_variable, "MASTER_PORT")
        leaked = _SHM / f"deepspeed_allreduce_buffer_0_127.0.0.1_{port}_0"
        leaked.touch()
    assert not leaked.exists()


def test_a_world_that_is_garbage_collected_ends() -> None:
    world = spawn(Topology(tp=2))
    pids = world.run(bodies.process_id)
    del world
    assert survivors(list(pids)) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_their_controller(how: signal.Signals, short_tmp: Path) -> None:
    pids = _kill_during_a_run(short_tmp, lambda controller, forkserver: controller.send_signal(how))
    assert survivors(pids) == []
    assert not list(short_tmp.glob("tpcheck-*"))


def test_ranks_end_with_their_forkserver(short_tmp: Path) -> None:
    pids = _kill_during_a_run(short_tmp, lambda controller, forkserver: os.kill(forkserver, signal.SIGKILL))
    assert survivors(pids) == []
    assert not list(short_tmp.glob("tpcheck-*"))


def test_a_thread_that_ends_while_it_starts_a_world_leaves_no_folder(short_tmp: Path) -> None:
    script = short_tmp / "script.py"
    script.write_text(
        "import threading, time\n"
        "from tpcheck import Topology, spawn\n"
        "from tpcheck.world import world\n"
        "reached = threading.Event()\n"
        "def stall(*_, scratch, **__): print(scratch); reached.set(); time.sleep(1000)\n"
        "world.LocalHost = stall\n"
        "run = spawn(Topology(tp=1), device='cpu', preload=['json']).run\n"
        "threading.Thread(target=run, args=(print,), daemon=True).start()\n"
        "reached.wait()\n"
    )
    environ = {**os.environ, "TMPDIR": str(short_tmp)}
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environ, check=True)
    assert Path(done.stdout.strip()).parent.parent == short_tmp
    assert not list(short_tmp.glob("tpcheck-*"))


def _forkserver_started_for(arguments: list[str], tmp: Path) -> int | None:
    """Return the process that a command has started before it reads these arguments; the command has ended."""
    script = "from tpcheck.__main__ import _start_forkserver; import psutil, sys; _start_forkserver(sys.argv[1:]); "
    script += "print(*(child.pid for child in psutil.Process().children()))"
    environ = {**os.environ, "TMPDIR": str(tmp), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ, check=True)
    return int(done.stdout) if done.stdout.strip() else None


def test_a_forkserver_that_nobody_needs_ends_with_its_controller(short_tmp: Path) -> None:
    pid = _forkserver_started_for(["verify", "no_such_family"], short_tmp)
    assert pid is not None
    assert not _runs(pid)
    assert not list(short_tmp.glob("tpcheck-*"))


@pytest.mark.parametrize("arguments", [["verify"], ["verify", "--help"], ["topology", "--world", "4"]], ids=" ".join)
def test_a_command_that_runs_no_ranks_starts_no_forkserver(short_tmp: Path, arguments: list[str]) -> None:
    assert _forkserver_started_for(arguments, short_tmp) is None


def _kill_during_a_run(tmp_path: Path, kill: Callable[[subprocess.Popen[str], int], None]) -> list[int]:
    """Start a controller, call `kill` while its ranks run; return all of its processes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from tpcheck import Topology, spawn\n"
        "def body(rank):\n"
        "    os.write(1, f'{os.getpid()} {os.getppid()}\\n'.encode()); time.sleep(1000)\n"
        "with spawn(Topology(tp=2), preload=['torch'], capture=False) as world:\n"
        "    world.run(body)\n"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environ) as controller:
        assert controller.stdout is not None
        lines = [[int(pid) for pid in controller.stdout.readline().split()] for _ in range(2)]
        forkserver = lines[0][1]
        kill(controller, forkserver)
        controller.wait(timeout=10)
        return [controller.pid, forkserver, *(line[0] for line in lines)]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _description(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"{pid} {process.status()}, child of {process.ppid()}: {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return f"{pid}, which has just exited"
