"""The controller's side of a forkserver: started at first use and shared by all worlds of the process."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tpcheck.core.errors import TpcheckError
from tpcheck.world import messages
from tpcheck.world.channel import Channel
from tpcheck.world.environment import forkserver_environ

# What the forkserver imports once, so that no rank has to. Packages that import lazily are named by the submodules that
# ranks reach within their first second.
DEFAULT_PRELOAD: tuple[str, ...] = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.utils.data",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.engine",
    "deepspeed.module_inject.auto_tp",
    "deepspeed.module_inject.auto_ep_layer",
    "cloudpickle",
)
# Beside those where tests run: only their ranks need them.
_PYTEST_PRELOAD = ("pytest", "hypothesis", "tpcheck.pytest_plugin.preload")

# Imported by every rank of a DeepSpeed engine with ZeRO: the decorators of an optimizer load TorchInductor.
ZERO_PRELOAD: tuple[str, ...] = ("deepspeed.runtime.zero.muon.muon_optimizer",)
# Each rank would import the Trainer anew, which takes seconds.
TRAINER_PRELOAD: tuple[str, ...] = ("tpcheck.backends.trainer_loop.loop", "tpcheck.backends.trainer_loop.stand_ins")

_START_LIMIT_S = 600.0  # imports from a cold disk, on a machine that runs other tests
# Linux limits the path of a socket to 107 bytes, macOS to 103. The path of multiprocessing's sockets is 40 bytes longer
# than the folder that is chosen here: /tpcheck-abcdefgh/1234/listener-abcdefgh.
_MAX_FOLDER_BYTES = 63
_BOOT = "import json, sys; d, path, names, scratch = json.loads(sys.argv[1]); sys.path[:] = path; \
from tpcheck.world.forkserver import main; main(d, names, scratch)"

# The only global state of this package: a forkserver takes seconds to start and serves every world of the process. The
# process id is part of the key because a forked copy of the controller must not use the same socket.
_forkservers: dict[tuple[int, str, tuple[str, ...] | None], ForkserverClient] = {}
_start_lock = threading.Lock()


def get_forkserver(device: str, preload: Sequence[str] | None = None) -> ForkserverClient:
    """Return the forkserver for this kind of device (cpu or cuda) and these imports; start it without waiting."""
    names = None if preload is None else tuple(preload)
    key = (os.getpid(), device, names)
    with _start_lock:
        forkserver = _forkservers.get(key)
        if forkserver is None or forkserver.has_ended:
            forkserver = _forkservers[key] = ForkserverClient(device, default_preload() if names is None else names)
        return forkserver


def default_preload() -> tuple[str, ...]:
    """Return the modules to import where the caller names none."""
    return (*DEFAULT_PRELOAD, *_PYTEST_PRELOAD) if "pytest" in sys.modules else DEFAULT_PRELOAD


def _folder_for_sockets(folder: str) -> str:
    """Return the folder, or /tmp where torch or a socket cannot use a path in it."""
    try:
        fits = len(folder.encode()) <= _MAX_FOLDER_BYTES
    except UnicodeEncodeError:  # torch's FileStore takes UTF-8 only
        fits = False
    return "/tmp" if not fits and os.access("/tmp", os.W_OK | os.X_OK) else folder


class ForkserverClient:
    """A running forkserver.

    Attributes:
        scratch: Parent folder of the worlds' folders. The forkserver removes it, too, when it exits, so that a
            controller that is killed leaves none of them.
    """

    def __init__(self, device: str, preload: tuple[str, ...]) -> None:
        self._channel, server_socket = Channel.pair()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self.scratch = tempfile.mkdtemp(prefix="tpcheck-", dir=_folder_for_sockets(tempfile.gettempdir()))
        self._ready: messages.ForkserverReady | None = None
        try:
            self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self._process = self._start(device, preload, server_socket)
            atexit.register(self._stop, os.getpid())
        except BaseException:  # Ctrl-C included; a process that has been started ends when the channel is closed
            self._channel.close()
            shutil.rmtree(self.scratch, ignore_errors=True)
            raise
        finally:
            server_socket.close()

    def _start(self, device: str, preload: tuple[str, ...], server_socket: socket.socket) -> subprocess.Popen[bytes]:
        arguments = json.dumps([server_socket.fileno(), sys.path, preload, self.scratch])
        # As multiprocessing passes them on.
        flags: list[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()
        return subprocess.Popen(
            [sys.executable, *flags, "-c", _BOOT, arguments],
            pass_fds=[server_socket.fileno()],
            env={**os.environ, **forkserver_environ(device)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    @property
    def has_ended(self) -> bool:
        """Whether it can start no more worlds: the process exited, or its temporary folder was deleted."""
        return self._process.poll() is not None or not Path(self.scratch).is_dir()

    def wait_until_ready(self) -> messages.ForkserverReady:
        """Wait until the imports are done.

        Raises:
            TpcheckError: The process exited, or is not ready in time.
        """
        with self._lock:
            deadline = time.monotonic() + _START_LIMIT_S
            while self._ready is None:
                remaining = deadline - time.monotonic()
                select.select([self._channel], [], [], max(0.0, remaining))
                for message, _ in self._channel.receive_available():
                    self._ready = message
                if self._ready is None and (self._channel.ended or remaining <= 0):
                    raise self.error("did not start")
            return self._ready

    def open_world(self, scratch: str, port: int, extra_preload: tuple[str, ...]) -> Channel:
        """Return the channel of a new world; when it closes, the forkserver ends that world.

        `extra_preload` is imported before the ranks are forked, and remains imported for later worlds.
        """
        self.wait_until_ready()
        channel, server_socket = Channel.pair()
        try:
            with self._lock:
                self._channel.send(messages.OpenWorld(scratch, port, extra_preload), [server_socket.fileno()])
        except OSError:
            channel.close()
            raise self.error("has exited") from None
        finally:
            server_socket.close()
        return channel

    def new_scratch(self) -> str:
        """Return a new folder for one world. Its name is short: the path of a socket has at most 107 bytes."""
        folder = Path(self.scratch, str(next(self._numbers)))
        folder.mkdir(mode=0o700)
        return str(folder)

    def error(self, what: str) -> TpcheckError:
        """Return an error that shows the last output of the process."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        size = os.fstat(self._log.fileno()).st_size
        output = os.pread(self._log.fileno(), 4096, max(0, size - 4096)).decode(errors="replace").strip()
        status = "still running" if self._process.returncode is None else f"exit status {self._process.returncode}"
        return TpcheckError(f"the forkserver {what} ({status}). Its output:\n{output or '(nothing)'}")

    def _stop(self, controller_pid: int) -> None:
        if os.getpid() != controller_pid:
            return
        self._channel.close()
        if self._ready is None:  # it has opened no world, and would see only after its imports that nobody needs it
            self._process.kill()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)  # the forkserver has removed it, unless it was killed
