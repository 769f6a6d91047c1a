"""The process of one rank: joins the world, answers each run with one report, exits."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.process
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tpcheck.core.generators import seed_everything
from tpcheck.world import groups, messages, output
from tpcheck.world.channel import Channel, dumps, loads
from tpcheck.world.failures import serialized_exception
from tpcheck.world.rank import DebuggerOptions, Rank, set_trace

_LIBC = ctypes.CDLL(None)


def rank_main(request: messages.ForkRank, descriptors: list[int]) -> NoReturn:
    """Serve the controller until it sends `Exit`, or has exited itself."""
    control, stdout, stderr, stack_file = descriptors
    _set_up_process(request, stdout, stderr, stack_file)
    _RankServer(request, Channel(socket.socket(fileno=control))).serve()


def _set_up_process(request: messages.ForkRank, stdout: int, stderr: int, stack_file: int) -> None:
    """Set the descriptors, environment, import path and folder that the controller has sent."""
    devnull = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((devnull, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]  # text files, before code under test runs
    output.dump_on_signal(stack_file)
    os.chdir(request.cwd)
    _set_environ(request.environ)
    sys.argv[:] = request.argv
    sys.path[:] = request.sys_path
    tempfile.tempdir = None  # cached by the forkserver, from another environment
    # Data loader workers pass tensors through sockets, which multiprocessing removes at exit, and ranks skip that.
    multiprocessing.process.current_process()._config["tempdir"] = request.scratch  # type: ignore[attr-defined]


def _set_environ(environ: Mapping[str, str]) -> None:
    """Change what differs: to read or write any object of the forkserver's copies its page."""
    for name in [name for name in os.environ if name not in environ]:
        del os.environ[name]
    for name, value in environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


class _RankServer:
    def __init__(self, request: messages.ForkRank, control: Channel) -> None:
        self._request = request
        self._control = control
        self._pid = os.getpid()
        self._streams = sys.stdout, sys.stderr
        self._default_group: Any = None
        debugger = DebuggerOptions(
            on_prompt=lambda active: control.send(messages.Debugging(active)),
            lock_file=str(Path(request.scratch) / "prompt"),
        )
        self._rank = Rank(request.rank, request.topology, device=request.device, debugger=debugger)
        sys.breakpointhook = lambda *_, **__: set_trace(request.rank, debugger)

    def serve(self) -> NoReturn:
        startup = self._attempt(self._join_world)
        while True:
            try:
                message = self._control.receive()
            except (EOFError, OSError):
                os._exit(1)
            if isinstance(message, messages.Exit):
                self._exit()
            self._report(message, startup)

    def _join_world(self) -> None:
        import torch
        from torch._C._distributed_c10d import set_debug_level_from_env

        torch.set_num_threads(1)
        set_debug_level_from_env()  # the forkserver read TORCH_DISTRIBUTED_DEBUG from another environment
        groups.disable_ddp_logger_under_detail()
        location = groups.StoreLocation(Path(self._request.scratch), self._request.store)
        world_size = self._request.topology.world_size
        groups.use_store_for_env_rendezvous(location)
        if self._request.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(self._request.device))
            torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.distributed.init_process_group(
            groups.group_backend(self._request.backend),  # on GPUs it takes CPU tensors as well
            store=location.open("default", world_size),
            rank=self._request.rank,
            world_size=world_size,
            timeout=groups.NO_TIMEOUT,
        )
        self._default_group = torch.distributed.group.WORLD

    def _report(
        self, run: messages.RunFunction, startup: messages.SerializedResult | messages.SerializedException
    ) -> None:
        outcome = startup if isinstance(startup, messages.SerializedException) else self._attempt(self._call, run)
        at = time.monotonic()
        self._flush()
        reusable = isinstance(outcome, messages.SerializedResult) and self._has_its_default_group()
        self._control.send(messages.RankReport(os.getpid(), at, outcome, reusable))
        if os.getpid() != self._pid:
            os._exit(1)  # a child that the function forked and that returned from it: the controller gets two reports

    def _attempt(self, act: Callable[..., Any], *args: Any) -> messages.SerializedResult | messages.SerializedException:
        try:
            return serialized_result(act(*args), self._request.rank)
        except BaseException as error:  # SystemExit and the outcomes of pytest too
            return serialized_exception(error)

    def _call(self, run: messages.RunFunction) -> Any:
        sys.stdout, sys.stderr = self._streams  # transformers points them at devnull on ranks above 0
        # Without a seed each rank has a different one: equal seeds hide a missing broadcast.
        seed_everything(1_000_003 * (self._request.rank + 1) if run.seed is None else run.seed)
        fn, args, kwargs = loads(run.call)
        return fn(self._rank, *args, **kwargs)

    def _has_its_default_group(self) -> bool:
        """Return whether the default group is still the first one: a new one may not match those of other ranks."""
        from torch import distributed as dist

        return dist.is_initialized() and dist.group.WORLD is self._default_group

    def _exit(self) -> NoReturn:
        """Exit once every rank is ready to.

        Groups are not destroyed: that waits 10 ms per group for its threads. To exit without it is safe only once no
        rank needs another, so every rank sends `ReadyToExit` first. What happens to an exiting process when a peer
        disappears does not matter, so it writes no core file.
        """
        import resource

        self._flush()
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with contextlib.suppress(EOFError, OSError):
            self._control.send(messages.ReadyToExit())
            self._control.receive()
        os._exit(0)

    def _flush(self) -> None:
        for stream in {*self._streams, sys.stdout, sys.stderr}:
            with contextlib.suppress(Exception):  # code under test may have closed or replaced it
                stream.flush()
        _LIBC.fflush(None)


def serialized_result(result: Any, rank: int) -> messages.SerializedResult:
    """Return the result as a message.

    Raises:
        TypeError: It does not pickle; names the rank and the type.
    """
    type_name = f"{type(result).__module__}.{type(result).__qualname__}".removeprefix("builtins.")
    try:
        return messages.SerializedResult(dumps(result), type_name)
    except Exception as error:
        raise TypeError(
            f"rank {rank} returned a {type_name} that does not pickle: {type(error).__name__}: {error}"
        ) from None
