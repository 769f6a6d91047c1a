"""What a rank does from its fork to its end: joins the world, answers each run with one report, leaves."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.process
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from tpcheck.world import environment, groups, messages, output, shm_allreduce
from tpcheck.world.channel import Channel, dumps, loads
from tpcheck.world.failures import failure_of
from tpcheck.world.rank import Prompt, Rank, set_trace


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPUs)."""
    random.seed(seed)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(seed % 2**32)  # code under test draws from the global generator
    import torch

    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 2.4 ms at its first call in a process
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def seed_of_rank(rank: int) -> int:
    """Return a seed that no other rank has: with equal seeds, a broadcast that is missing goes unseen."""
    return 1_000_003 * (rank + 1)


def leave_out_under_detail() -> None:
    """Make DDP skip its construction log, where groups are wrapped."""
    dist: Any = import_module("torch.distributed")  # exports these names without declaring them
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:
        dist.Logger = type("Logger", (dist.Logger,), {"set_construction_data_and_log": lambda *_, **__: None})


_LIBC = ctypes.CDLL(None)


def rank_main(order: messages.Fork, descriptors: list[int]) -> NoReturn:
    """Serve the controller until it says to leave, or is gone."""
    control, stdout, stderr, stack_file = descriptors
    _settle(order, stdout, stderr, stack_file)
    _RankProcess(order, Channel(socket.socket(fileno=control))).serve()


def _settle(order: messages.Fork, stdout: int, stderr: int, stack_file: int) -> None:
    """Take over descriptors, environment and import path of the controller's world."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]  # real text files here
    output.dump_on_signal(stack_file)
    os.chdir(order.cwd)
    environment.apply(order.environ)
    sys.argv[:] = order.argv
    sys.path[:] = order.sys_path
    _forget_missing_folders()
    _keep_temporary_files_in(order.scratch)
    shm_allreduce.disable()


def _keep_temporary_files_in(scratch: str) -> None:
    """Let multiprocessing put its sockets (data loader workers pass tensors through them) where the world cleans up.

    It would remove them at exit, which ranks do not come by; other temporary files follow the rank's own TMPDIR.
    """
    tempfile.tempdir = None  # the template's, from another environment
    multiprocessing.process.current_process()._config["tempdir"] = scratch  # type: ignore[attr-defined]


def _forget_missing_folders() -> None:
    """Let imports see folders that were not there yet when the template looked; others are checked by their mtime."""
    for folder in [path for path, finder in sys.path_importer_cache.items() if finder is None]:
        del sys.path_importer_cache[folder]


class _RankProcess:
    def __init__(self, order: messages.Fork, control: Channel) -> None:
        self._order = order
        self._control = control
        self._pid = os.getpid()
        self._streams = sys.stdout, sys.stderr
        self._default_group: Any = None
        prompt = Prompt(
            announce=lambda active: control.send(messages.Debugging(active)), lock=str(Path(order.scratch) / "prompt")
        )
        self._rank = Rank(order.rank, order.topology, device=order.device, prompt=prompt)
        sys.breakpointhook = lambda *_, **__: set_trace(order.rank, prompt)

    def serve(self) -> NoReturn:
        startup = self._attempt(self._join)
        while True:
            try:
                message = self._control.receive()
            except (EOFError, OSError):
                os._exit(1)
            if isinstance(message, messages.Leave):
                self._leave()
            self._report(message, startup)

    def _join(self) -> None:
        import torch

        torch.set_num_threads(1)
        _read_debug_level()
        leave_out_under_detail()
        order = self._order
        scratch = Path(order.scratch)
        groups.serve_env(scratch)
        groups.start_default_group(
            groups.store(scratch, "default", order.topology.world_size),
            rank=order.rank,
            world_size=order.topology.world_size,
            device=order.device,
            backend=order.backend,
        )
        self._default_group = torch.distributed.group.WORLD

    def _report(self, run: messages.Run, startup: messages.Result | messages.Failure) -> None:
        outcome = startup if isinstance(startup, messages.Failure) else self._attempt(self._call, run)
        at = time.monotonic()
        self._flush()
        is_failure = isinstance(outcome, messages.Failure)
        report = messages.Report(
            number=run.number,
            pid=os.getpid(),
            at=at,
            result=None if isinstance(outcome, messages.Failure) else outcome,
            failure=outcome if isinstance(outcome, messages.Failure) else None,
            reusable=not is_failure and self._is_reusable(),
        )
        self._control.send(report)
        if os.getpid() != self._pid:
            os._exit(1)  # a child that was forked inside the function: the controller sees that it came back, too

    def _attempt(self, act: Callable[..., Any], *args: Any) -> messages.Result | messages.Failure:
        try:
            return result_of(act(*args), self._order.rank)
        except BaseException as error:  # SystemExit and pytest's outcomes are reports, too
            return failure_of(error)

    def _call(self, run: messages.Run) -> Any:
        sys.stdout, sys.stderr = self._streams  # transformers points them at devnull on ranks above 0
        seed_everything(seed_of_rank(self._order.rank) if run.seed is None else run.seed)
        fn, args, kwargs = loads(run.call)
        return fn(self._rank, *args, **kwargs)

    def _is_reusable(self) -> bool:
        """Tell whether the function left the default group alone; a new one would not match those of other ranks."""
        from torch import distributed as dist

        return dist.is_initialized() and dist.group.WORLD is self._default_group

    def _leave(self) -> NoReturn:
        """Go when everybody can go.

        Groups are not destroyed: that waits 10 ms per group for its threads. Leaving without it is safe only once no
        rank needs another, so all say `Left` first; what a vanished peer does to a process that is exiting is nobody's
        concern, its core file included.
        """
        import resource

        self._flush()
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with contextlib.suppress(EOFError, OSError):
            self._control.send(messages.Left())
            self._control.receive()
        os._exit(0)

    def _flush(self) -> None:
        for stream in {*self._streams, sys.stdout, sys.stderr}:
            with contextlib.suppress(Exception):  # code under test may have closed or replaced it
                stream.flush()
        _LIBC.fflush(None)


def _read_debug_level() -> None:
    """Read TORCH_DISTRIBUTED_DEBUG again: the template did so in another environment."""
    from torch._C._distributed_c10d import set_debug_level_from_env

    set_debug_level_from_env()


def result_of(result: Any, rank: int) -> messages.Result:
    """Return the result made ready to travel.

    Raises:
        TypeError: It does not pickle; says whose and what it is.
    """
    kind = f"{type(result).__module__}.{type(result).__qualname__}".removeprefix("builtins.")
    try:
        return messages.Result(dumps(result), kind)
    except Exception as error:
        raise TypeError(
            f"rank {rank} returned a {kind} that does not pickle: {type(error).__name__}: {error}"
        ) from None
