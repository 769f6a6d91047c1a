"""A debugger prompt on one rank suspends the deadline of the world."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

_SCRIPT = """
from tpcheck import Topology, spawn

def body(rank):
    import torch
    answer = 42
    if rank.rank == 1:
        {statement}
    torch.distributed.barrier()
    return answer

with spawn(Topology(tp=2), timeout=3, preload=["torch"]) as world:
    print("results", world.run(body))
"""


class Terminal:
    """A script that runs in a new terminal."""

    def __init__(self, script: Path) -> None:
        self._pid, self._descriptor = pty.fork()
        if self._pid == 0:
            os.execv(sys.executable, [sys.executable, str(script)])
        self.seen = ""

    def wait_for(self, text: str, *, limit_s: float = 30) -> None:
        deadline = time.monotonic() + limit_s
        while text not in self.seen:
            assert select.select([self._descriptor], [], [], deadline - time.monotonic())[0], self.seen
            self.seen += os.read(self._descriptor, 4096).decode()

    def type(self, line: str) -> None:
        self.seen = ""
        os.write(self._descriptor, f"{line}\n".encode())

    def exit_status(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._descriptor)
        return status


def test_a_debugger_prompt_suspends_the_deadline(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.format(statement="breakpoint(); rank.breakpoint()"))
    terminal = Terminal(script)
    terminal.wait_for("(rank 1) ")
    time.sleep(3.5)
    terminal.type("continue")
    terminal.wait_for("(rank 1) ")
    assert "torch.distributed.barrier()" in terminal.seen  # stopped in the user's code, at its next line
    terminal.type("answer = 43")
    terminal.wait_for("(rank 1) ")
    terminal.type("next")
    terminal.wait_for("(rank 1) ")
    terminal.type("continue")
    terminal.wait_for("results (42, 43)")
    assert terminal.exit_status() == 0


def test_a_breakpoint_without_a_terminal_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.format(statement="rank.breakpoint()"))
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=60)
    assert "UsageError: breakpoint='rank 1': expected an interactive terminal for the debugger" in done.stderr
