"""The controller's handle on its template process: started at first need, once, and shared by all worlds."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import select
import shutil
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
from tpcheck.world.environment import template_environ
from tpcheck.world.preload import DEFAULT

_START_LIMIT_S = 600.0  # imports from a cold disk, on a machine that runs other tests
_BOOT = "import json, sys; d, path, names = json.loads(sys.argv[1]); sys.path[:] = path; \
from tpcheck.world.forkserver import main; main(d, names)"

# The one piece of state of this package: a template costs seconds to start and serves every world of the process. Keyed
# by what is baked into it; by process, because a forked copy of the controller must not speak on the same socket.
_templates: dict[tuple[int, str, tuple[str, ...]], Template] = {}
_starting = threading.Lock()


def template(device: str, preload: Sequence[str] | None = None) -> Template:
    """Return the template for this kind of device (cpu or cuda) and these imports; starts it without waiting for it."""
    names = DEFAULT if preload is None else tuple(preload)
    key = (os.getpid(), device, names)
    with _starting:
        found = _templates.get(key)
        if found is None or found.is_over:
            found = _templates[key] = Template(device, names)
        return found


class Template:
    """A running template process."""

    def __init__(self, device: str, names: tuple[str, ...]) -> None:
        self._channel, theirs = Channel.pair()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._ready: messages.Ready | None = None
        arguments = json.dumps([theirs.fileno(), sys.path, names])
        self._process = subprocess.Popen(
            [sys.executable, *_interpreter_flags(), "-c", _BOOT, arguments],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **template_environ(device)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        theirs.close()
        atexit.register(self._stop, os.getpid())

    @property
    def is_over(self) -> bool:
        """Tell whether it can serve no further world: it ended, or somebody cleaned its temporary folder away."""
        return self._process.poll() is not None or (self._ready is not None and not Path(self._ready.scratch).is_dir())

    def ready(self) -> messages.Ready:
        """Wait until the imports are done.

        Raises:
            TpcheckError: The process ended, or takes for ever.
        """
        with self._lock:
            deadline = time.monotonic() + _START_LIMIT_S
            while self._ready is None:
                left = deadline - time.monotonic()
                select.select([self._channel], [], [], max(0.0, left))
                for message, _ in self._channel.pump():
                    self._ready = message
                if self._ready is None and (self._channel.ended or left <= 0):
                    raise self.failure("did not start")
            return self._ready

    def open_world(self, scratch: str, port: int, also: tuple[str, ...]) -> Channel:
        """Return a channel of its own for one world; when it closes, the template ends that world.

        What is in `also` is imported before its ranks are forked, and stays for the worlds after it.
        """
        self.ready()
        here, theirs = Channel.pair()
        try:
            with self._lock:
                self._channel.send(messages.Open(scratch, port, also), [theirs.fileno()])
        except OSError:
            here.close()
            raise self.failure("is gone") from None
        finally:
            theirs.close()
        return here

    def new_scratch(self) -> str:
        """Return a new folder for one world. Names are short: sockets in it have no more than 107 letters."""
        folder = Path(self.ready().scratch, str(next(self._numbers)))
        folder.mkdir(mode=0o700)
        return str(folder)

    def failure(self, what: str) -> TpcheckError:
        """Return an error that shows what the process said last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        size = os.fstat(self._log.fileno()).st_size
        said = os.pread(self._log.fileno(), 4096, max(0, size - 4096)).decode(errors="replace").strip()
        status = "still running" if self._process.returncode is None else f"exit status {self._process.returncode}"
        return TpcheckError(
            f"the process that ranks are forked from {what} ({status}). It said:\n{said or '(nothing)'}"
        )

    def _stop(self, owner: int) -> None:
        if os.getpid() != owner:
            return
        self._channel.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._ready is not None:  # it removed this itself, unless it was killed
            shutil.rmtree(self._ready.scratch, ignore_errors=True)


def _interpreter_flags() -> list[str]:
    """Return the options that this interpreter was started with, as multiprocessing passes them on."""
    flags: list[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()
    return flags
